"""Real builds of whole models: what a cut saves, and what the page of builds says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.bench_engines import build_rows, versions
from tests.benchmarks.engine_subjects import SUBJECTS
from tests.benchmarks.engine_table import BuildRow, pairs, read_rows, render

PAGE = Path(__file__).parents[2] / "exporter" / "engine" / "docs" / "builds.md"
BY_KEY = {subject.key: subject for subject in SUBJECTS}


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


def built(key: str, folder: Path) -> list[BuildRow]:
    rows = list(build_rows(BY_KEY[key], folder))
    assert_smaller_in_proportion(*rows)
    return rows


def assert_as_told(rows: list[BuildRow]) -> None:
    """The page says the same, where it was written with the same libraries."""
    page = PAGE.read_text(encoding="utf-8")
    if any(f"{name} {number}" not in page for name, number in versions().items()):
        return
    told = {(row.model, row.dtype, row.opset, row.cut): row for row in read_rows(page)}
    for row in rows:
        same = told[row.model, row.dtype, row.opset, row.cut]
        assert (row.network_layers, row.real_layers) == (same.network_layers, same.real_layers)
        assert row.engine_mb == pytest.approx(same.engine_mb, abs=0.2)


def test_the_page_has_every_model_and_each_cut_saves_in_proportion() -> None:
    rows = read_rows(PAGE.read_text(encoding="utf-8"))
    found = pairs(rows)
    assert [(r.model, r.dtype, r.opset) for r, _ in found] == [
        (subject.name, subject.dtype, subject.opset) for subject in SUBJECTS
    ]
    for whole, cut in found:
        assert_smaller_in_proportion(whole, cut)


def test_a_page_is_read_as_it_was_written() -> None:
    rows = [BuildRow("m", "float16", 20, 0, 2.0, 2.5, 30, 9, 1.5)]
    assert read_rows(render(rows, {"x": "1"}, "some CPU")) == rows
    with pytest.raises(AssertionError):
        assert_smaller_in_proportion(rows[0], rows[0])


@pytest.mark.torch
@pytest.mark.rtx
@pytest.mark.parametrize("key", ["bert-float16-20", "vit-float16-20"])
def test_an_encoder(key: str, tmp_path: Path) -> None:
    assert_as_told(built(key, tmp_path))


@pytest.mark.real_model
@pytest.mark.rtx
@pytest.mark.parametrize("key", ["smollm2-float16-20", "smollm2-bfloat16-23"])
def test_a_decoder(key: str, tmp_path: Path) -> None:
    assert_as_told(built(key, tmp_path))
