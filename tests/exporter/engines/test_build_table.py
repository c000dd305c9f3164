"""Real builds: what a cut saves, and what the page of builds says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.bench_engines import build_rows, versions
from tests.benchmarks.engine_subjects import SUBJECTS, bert, make_graphs, smollm2_shaped, vit
from tests.benchmarks.engine_table import BuildRow, pairs, read_rows, render

PAGE = Path(__file__).parents[3] / "exporter" / "engines" / "build" / "docs" / "builds.md"
BY_KEY = {subject.key: subject for subject in reversed(SUBJECTS)}  # the first of a name
SHALLOW: dict[str, Callable[..., Any]] = {
    "smollm2-float16-20": smollm2_shaped,
    "smollm2-bfloat16-24": smollm2_shaped,
    "bert-float16-20": bert,
    "vit-float16-20": vit,
}


def assert_smaller_in_proportion(whole: BuildRow, cut: BuildRow) -> None:
    """Each attention that was cut took the same number of layers with it."""
    assert cut.cut > whole.cut == 0
    assert cut.engine_mb < whole.engine_mb
    for gone in (
        whole.network_layers - cut.network_layers,
        whole.real_layers - cut.real_layers,
    ):
        assert gone > 0
        assert gone % cut.cut == 0
    # About the weights of what was cut; kernels go too.
    weights_mb = whole.onnx_mb - cut.onnx_mb
    assert whole.engine_mb - cut.engine_mb == pytest.approx(weights_mb, rel=0.4)


def built(key: str, folder: Path) -> tuple[BuildRow, BuildRow]:
    """The engines of a subject of three layers, two attentions cut."""
    subject = replace(BY_KEY[key], load=partial(SHALLOW[key], layers=3), cut=(1, 2))
    whole, cut = build_rows(subject, make_graphs(subject, folder), folder)
    assert_smaller_in_proportion(whole, cut)
    return whole, cut


def saved_by_one(whole: BuildRow, cut: BuildRow) -> tuple[float, float]:
    """Layers of the network and real ones that an attention takes with it."""
    return (
        (whole.network_layers - cut.network_layers) / cut.cut,
        (whole.real_layers - cut.real_layers) / cut.cut,
    )


def assert_saves_what_is_told(key: str, whole: BuildRow, cut: BuildRow) -> None:
    """The page says the same of the deep model, where it was written with the same libraries."""
    page = PAGE.read_text(encoding="utf-8")
    if any(f"{name} {number}" not in page for name, number in versions().items()):
        return
    subject = BY_KEY[key]
    (told,) = (
        pair
        for pair in pairs(read_rows(page))
        if (pair[0].model, pair[0].dtype, pair[0].opset, pair[0].card)
        == (subject.name, subject.dtype, subject.opset, subject.card)
    )
    assert saved_by_one(whole, cut) == saved_by_one(*told)


def test_the_page_has_every_model_and_each_cut_saves_in_proportion() -> None:
    rows = read_rows(PAGE.read_text(encoding="utf-8"))
    found = pairs(rows)
    assert [(r.model, r.dtype, r.opset, r.card) for r, _ in found] == [
        (subject.name, subject.dtype, subject.opset, subject.card) for subject in SUBJECTS
    ]
    assert {row.alike for row in rows} == {"yes"}
    assert all(row.rest_s < row.builder_s for row in rows)
    for whole, cut in found:
        assert_smaller_in_proportion(whole, cut)


def test_a_page_is_read_as_it_was_written() -> None:
    rows = [BuildRow("m", "float16", 20, "sm89", 0, 2.0, 2.5, 30, 9, 4, 1.5, 0.5, "yes")]
    assert read_rows(render(rows, {"x": "1"}, "some CPU")) == rows
    with pytest.raises(AssertionError):
        assert_smaller_in_proportion(rows[0], rows[0])


@pytest.mark.long
@pytest.mark.torch
@pytest.mark.rtx
@pytest.mark.parametrize("key", SHALLOW)
def test_an_attention_saves_what_the_page_says(key: str, tmp_path: Path) -> None:
    assert_saves_what_is_told(key, *built(key, tmp_path))
