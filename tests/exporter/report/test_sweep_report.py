"""A sweep's table: against what each figure is held, what is told of failures and machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.artifacts import SweepReport, SweepShape
from exporter.report.files import SWEEP_REPORTS, write_sweep
from exporter.report.sections.blocks import Grid, Link, Sign, plain
from exporter.report.sections.sweep import cells_grid, gain, sweep_document, sweep_lead
from tests.made_tables import made_cell, made_failure, made_result, made_shape, made_sweep


def words(grid: Grid) -> list[list[str]]:
    return [[plain(cell) for cell in row] for row in grid.rows]


def test_a_quantised_cell_is_held_against_the_whole_model_in_float() -> None:
    report = made_sweep(
        [
            made_cell("m", "a", "fp32", made_result(1.1, 16.0)),
            made_cell("m", "a", "int4", made_result(1.1, 17.0, scheme="int4")),
        ]
    )
    grid = cells_grid(report)
    assert list(grid.header)[3:5] == ["prefill 512", "decode at 512"]
    assert words(grid) == [
        ["m", "A: a", "fp32", "1.14x", "1.10x", "16.00 (+9.6 %)", "0.200", "510.0 (-5.6 %)"],
        ["", "B: a", "int4", "2.20x", "2.20x", "17.00 (+16.4 %)", "0.300", "150.0 (-72.2 %)"],
    ]
    assert isinstance(grid.rows[0][1], Link)
    assert grid.rows[0][1].target == "cells/m/a/fp32/report.html"


def shape(ratio: float, low: float, high: float, rounds: int = 12) -> SweepShape:
    over = {"value": ratio, "ci95": (low, high)}
    return made_shape("decode 8", 1.0, over_float=over, rounds=rounds)


@pytest.mark.parametrize(
    ("timed", "tone"),
    [
        (made_shape("decode 8", 1.1), "good"),
        (made_shape("decode 8", 1.0), "unsure"),
        (made_shape("decode 8", 1.0, verdict="slower"), "bad"),
        (shape(1.1, 1.05, 1.2), "good"),
        (shape(1.1, 0.9, 1.2), "unsure"),
        (shape(0.8, 0.7, 0.9), "bad"),
        (shape(1.1, 1.05, 1.2, rounds=2), "unsure"),
    ],
)
def test_a_gain_is_called_one_only_beyond_its_interval(timed: SweepShape, tone: str) -> None:
    report = made_sweep([made_cell("m", "a", "p", made_result(1.0, 15.0, shapes=[timed]))])
    sign = cells_grid(report).rows[0][3]
    assert isinstance(sign, Sign)
    assert sign.tone == tone
    assert sign.word == f"{gain(timed)[0]:.2f}x"


def test_letters_stay_whatever_is_done_so_far() -> None:
    cells = [
        made_failure("m", "a", "fp32"),
        made_cell("m", "a", "int8"),
        made_cell("m", "b", "fp32", made_result(1.1, 15.0)),
    ]
    rows = words(cells_grid(made_sweep(cells)))
    assert [row[1] for row in rows] == ["A: a", "B: a", "C: b"]
    assert [row[3] for row in rows] == ["failed", "not run", "1.14x"]
    assert sweep_lead(made_sweep(cells)).endswith("3 cells, 1 done, 1 failed, 1 not run.")


def test_nothing_done_is_a_table_too(tmp_path: Path) -> None:
    report = made_sweep([made_cell("m", "a", "fp32"), made_failure("m", "b", "fp32")])
    assert [row[3] for row in words(cells_grid(report))] == ["not run", "failed"]
    write_sweep(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(SWEEP_REPORTS)


def parts(report: SweepReport) -> dict[str, str]:
    return {part.key: str(part.blocks) for part in sweep_document(report).sections}


def test_several_machines_are_warned_of_and_one_is_not() -> None:
    one = made_cell("m", "a", "fp32", made_result(1.1, 15.0))
    other = made_cell("m", "b", "fp32", made_result(1.1, 15.0, machine="Xeon", threads=4))
    assert "don't compare" not in parts(made_sweep([one]))["machines"]
    assert sweep_lead(made_sweep([one])) == "1 model x 1 plan x 1 precision: 1 cell, 1 done."
    machines = parts(made_sweep([one, other]))["machines"]
    assert "don't compare" in machines
    assert "Xeon, 4 threads: B" in machines


def test_what_failed_says_why_and_is_left_out_where_nothing_did() -> None:
    done = made_cell("m", "a", "fp32", made_result(1.1, 15.0))
    assert "failures" not in parts(made_sweep([done]))
    failures = parts(made_sweep([done, made_failure("m", "b", "fp32", "No layer 9.")]))["failures"]
    assert "No layer 9. Take another plan." in failures


def test_a_model_without_perplexity_is_told_by_its_divergence() -> None:
    bare = made_result(1.1, 15.0).model_copy(update={"perplexity": None})
    (row,) = words(cells_grid(made_sweep([made_cell("m", "a", "fp32", bare)])))
    none = bare.model_copy(update={"kl_divergence": None})
    (other,) = words(cells_grid(made_sweep([made_cell("m", "a", "fp32", none)])))
    assert (row[-3], other[-3:-1]) == ("-", ["-", "-"])
    assert row[-2] != "-"


def test_foreign_words_stay_words(tmp_path: Path) -> None:
    failure = made_failure("m", "a", "fp32", "<script>|x")
    write_sweep(made_sweep([failure]), tmp_path)
    assert "<script>" not in (tmp_path / "sweep.html").read_text()
    assert "&lt;script>\\|x" in (tmp_path / "sweep.md").read_text()
