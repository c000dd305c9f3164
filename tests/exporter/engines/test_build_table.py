"""Real builds: what a cut saves, and what the page of builds says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.bench_engines import BuildRow, pairs, read_rows, render
from tests.benchmarks.engine_subjects import SUBJECTS

PAGE = Path(__file__).parents[3] / "exporter" / "engines" / "build" / "docs" / "builds.md"


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


def test_the_page_has_every_model_and_each_cut_saves_in_proportion() -> None:
    rows = read_rows(PAGE.read_text(encoding="utf-8"))
    result = pairs(rows)
    assert [(r.model, r.dtype, r.opset, r.card) for r, _ in result] == [
        (subject.name, subject.dtype, subject.opset, subject.card) for subject in SUBJECTS
    ]
    assert {row.alike for row in rows} == {"yes"}
    assert all(row.rest_s < row.builder_s for row in rows)
    for whole, cut in result:
        assert_smaller_in_proportion(whole, cut)


def test_a_page_is_read_as_it_was_written() -> None:
    rows = [BuildRow("m", "float16", 20, "sm89", 0, 2.0, 2.5, 30, 9, 4, 1.5, 0.5, "yes")]
    assert read_rows(render(rows, {"x": "1"}, "some CPU")) == rows
    with pytest.raises(AssertionError):
        assert_smaller_in_proportion(rows[0], rows[0])
