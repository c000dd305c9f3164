"""Parts of reports: all models, scores, healing; tables of depths and of sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import (
    ComparisonReport,
    DepthsReport,
    HealedFigure,
    HealedText,
    Healing,
    SweepReport,
    SweepShape,
)
from exporter.cli import run
from exporter.heal.healed import warnings_of
from exporter.report.files import SWEEP_REPORTS, write_study, write_sweep
from exporter.report.files import page as render
from exporter.report.sections.blocks import Grid, Link, Sign, plain
from exporter.report.sections.depths import depths_document
from exporter.report.sections.healing import healing_section
from exporter.report.sections.sweep import cells_grid, gain, sweep_document, sweep_lead
from tests.made_reports import as_markdown, as_page, full_report, gate_report
from tests.made_tables import (
    damage,
    made_answer,
    made_cell,
    made_depths,
    made_failure,
    made_result,
    made_shape,
    made_sweep,
)
from tests.present import present
from tests.reading import Page

# All models, and how each graph is written.


@pytest.fixture(scope="module")
def report() -> ComparisonReport:
    return full_report(rows=5, samples=24)


# Healing: both domains, the warning, every branch.


HEALING = present(full_report().healing)


def healed(role: Any, before: float, after: float, error: float = 0.01, kl: float = 0.2) -> Any:
    """What healing did on a text: the rise of the perplexity's logarithm before and after."""
    text = HEALING.texts[0]
    return text.model_copy(
        update={
            "role": role,
            "text": text.text.model_copy(update={"source": f"{role} text"}),
            "figures": {
                **text.figures,
                "log_perplexity_increase": HealedFigure(dropped=before, healed=after),
                "kl": text.figures["kl"].model_copy(update={"dropped": 0.5, "healed": kl}),
            },
            "gain": before - after,
            "gain_std_error": error,
        }
    )


def healing(*texts: HealedText) -> Healing:
    (branch,) = HEALING.branches
    branches = [
        branch.model_copy(update={"layer": 3, "parameters": 1100}),
        branch.model_copy(update={"layer": 4, "kind": "mlp", "replacement": "none"}),
    ]
    return HEALING.model_copy(
        update={
            "branches": branches,
            "parameters": 1100,
            "texts": [*texts],
            "warnings": warnings_of(texts),
        }
    )


BOTH = healing(healed("calibration", 0.6, 0.1), healed("other", 0.5, 0.2))
APART = healing(healed("calibration", 0.6, 0.1), healed("other", 0.5, 0.49))


OWN, OTHER = "calibration text", "other text"


@pytest.mark.parametrize(
    ("own", "other", "weak"),
    [
        ((0.6, 0.1), (0.5, 0.2), ""),
        ((0.6, 0.1), (0.5, 0.49), OTHER),  # 2 % is none
        ((0.6, 0.1), (0.5, 0.7), OTHER),  # a loss
        ((0.6, 0.59), (0.5, 0.1), OWN),
        ((0.6, 0.1), (0.5, 0.4), OTHER),  # 83 % against 20 %
        ((0.6, 0.62), (0.5, 0.52), f"{OWN} and {OTHER}"),
        ((0.6, 0.1), (0.5, 0.3, 0.2), OTHER),  # within its noise
        ((0.6, 0.1), (0.5, 0.3, 0.02), ""),
        ((0.6, 0.4, 0.2), (0.5, 0.3, 0.2), f"{OWN} and {OTHER}"),
        # A text may become likelier by chance while the answers are further from the whole model's.
        ((0.6, 0.1), (0.5, 0.2, 0.01, 0.8), OTHER),
        ((0.6, 0.1), (0.5, 0.2, 0.01, 0.4), ""),
        # Where dropping cost nothing there is no share that could be less than the other's.
        ((0.6, 0.1), (-0.01, -0.05), ""),
        ((-0.01, -0.05), (0.6, 0.1), ""),
        ((-0.01, -0.05), (0.6, 0.61), OTHER),
    ],
)
def test_a_text_on_which_healing_gained_little_is_warned_of(
    own: Any, other: Any, weak: str
) -> None:
    result = warnings_of([healed("calibration", *own), healed("other", *other)])
    assert [f" on {weak}; " in warning for warning in result] == [True] * bool(weak)


def test_reports_show_the_part_and_its_warning() -> None:
    bare = gate_report()
    assert healing_section(bare) is None
    assert "held out" not in as_markdown(bare)
    for item in (BOTH, APART):
        report = bare.model_copy(update={"healing": item})
        for written in (as_markdown(report), as_page(report)):
            assert "calibration text" in written
            assert ("Healing gained little" in written) == (item is APART)


# Several depths.


def test_markdown_has_every_cell_and_the_page_is_whole_and_escaped(tmp_path: Path) -> None:
    write_study(made_depths(), tmp_path / "depths.json")
    assert DepthsReport.read(tmp_path / "depths.json").cells == made_depths().cells
    text = (tmp_path / "depths.md").read_text()
    for words in (
        "- block of 2: The plan drops everything.",
        "| 1 attention | -1.0 % | - | +10.0 % [-1.0 %, +21.0 %] | - | 0.0200 | 75.0 % |",
        "| 2 attentions and MLPs | attention 0; MLP 1 |",
        "| nothing |  |  | 20.00 |",
        "| dropped | words, acc (12) |",
        "| 2 MLPs | 0.300 [-0.300, -0.100] |",
    ):
        assert words in text
    page = render(depths_document(made_depths(text="<script>alert(1)</script>")))
    assert "<script" not in page
    assert len(Page(page).all("table")) == len(Page(page).all("caption")) > 1


def test_the_answer_comes_first_with_its_reason(tmp_path: Path) -> None:
    write_study(made_answer(), tmp_path / "depths.json")
    assert DepthsReport.read(tmp_path / "depths.json").recommended == made_answer().cells[0]
    text = (tmp_path / "depths.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| 1 attention |")]
    assert all(figure in rows[0] for figure in ("1.06x", "+10.0 %", "+1.2 %", "recommended"))
    assert sum("recommended" in line for line in text.splitlines() if line.startswith("|")) == 1
    assert "There is no product." in text
    cut_next = text.splitlines()[text.splitlines().index(rows[0]) + 1]
    for row, figures in (
        ("| nothing, in int8 | -70.0 % | 1.90x [1.80, 2.00] | +0.5 % [", "0.00100"),
        ("| 1 attention, in int8 | -70.0 % | 1.90x [1.80, 2.00] |  | +1.7 % [", "0.00100"),
    ):
        (line,) = (line for line in text.splitlines() if line.startswith(row))
        assert figures in line
    assert cut_next == line  # beside the cut that is recommended
    write_study(made_answer(None), tmp_path / "depths.json")
    none = (tmp_path / "depths.md").read_text()
    assert "| nothing, in int8 |" in none
    assert "attention, in int8 |" not in none
    lead = depths_document(made_answer()).lead
    assert "1.06 times as fast" in lead
    assert "2.0 %" in lead


@pytest.mark.parametrize(
    ("healed", "ends", "most", "told", "untold"),
    [
        (1.05, (1.021, 1.08), 1.09, ("+5.0 %", "--at-most"), ()),
        (1.05, (1.019, 1.08), 1.09, ("+5.0 %", "+1.9 %", "--eval-tokens"), ()),
        (1.012, (0.911, 1.113), 1.2, ("+1.2 %", "-8.9 %", "--eval-tokens"), ()),
        # The interval alone is within the limit, but not for so many cuts; of one sample no end is.
        (1.005, (0.995, 1.018), 1.028, ("+1.8 %", "+2.8 %", "--eval-tokens"), ()),
        (1.005, None, None, ("+0.5 %", "--eval-tokens"), ()),
        # It keeps the limit, but isn't faster: more text is no help.
        (1.005, (1.001, 1.009), 1.012, ("1 attention,", "2.0 %"),
         ("--eval-tokens", "--at-most", "--time")),
    ],
)  # fmt: skip
def test_where_nothing_keeps_the_limit_the_next_step_is_told(
    healed: float, ends: Any, most: float | None, told: tuple[str, ...], untold: tuple[str, ...]
) -> None:
    update = {"perplexity_ratio_ci95": ends, "perplexity_ratio_most": most}
    cost = damage(healed, 0.01).model_copy(update=update)
    cells = [
        cell if cell.healed is None else cell.model_copy(update={"healed": cost})
        for cell in made_answer(None).cells
    ]
    report = made_answer(None).model_copy(update={"cells": cells})
    assert report.recommended is None
    document = depths_document(report)
    assert all(text in document.lead for text in told)
    assert not any(text in document.lead for text in untold)
    assert "recommended" not in str(document.sections[0].blocks[0])


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (["--ways", "attention,heads"], "heads"),
        (["-n", ","], "--numbers"),
        (["-o", "depths.md"], "depths.json"),
        (["--task-limit", "2"], "--tasks"),
    ],
)
def test_wrong_calls_are_refused_before_a_model_is_loaded(
    tmp_path: Path,
    option: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    scores = tmp_path / "importance.json"
    scores.write_text("{}")
    assert run(["depths", "nowhere", "--importance", str(scores), *option]) == 2
    assert told in capsys.readouterr().err


# Sweeps.


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
    assert [row[4:] for row in words(grid)] == [
        ["1.10x [1.08, 1.12]", "16.00 (+9.6 %)", "0.200", "510.0 (-5.6 %)"],
        ["2.20x [2.09, 2.31]", "17.00 (+16.4 %)", "0.300", "150.0 (-72.2 %)"],
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
    assert sign.word.startswith(f"{gain(timed)[0]:.2f}x [")


def test_letters_stay_whatever_is_done_so_far(tmp_path: Path) -> None:
    cells = [
        made_failure("m", "a", "fp32", "<script>|x"),
        made_cell("m", "a", "int8"),
        made_cell("m", "b", "fp32", made_result(1.1, 15.0)),
    ]
    rows = words(cells_grid(made_sweep(cells)))
    assert [row[1] for row in rows] == ["A: a", "B: a", "C: b"]
    assert [row[3] for row in rows] == ["failed", "not run", "1.14x [1.12, 1.16]"]
    assert sweep_lead(made_sweep(cells)).endswith("3 cells, 1 done, 1 failed, 1 not run.")
    write_sweep(made_sweep(cells), tmp_path)
    assert f"[C: b](<{cells[2].folder}/report.html>)" in (tmp_path / "sweep.md").read_text()
    report = made_sweep(cells[:2])  # nothing done is a table too
    assert [row[3] for row in words(cells_grid(report))] == ["failed", "not run"]
    write_sweep(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(SWEEP_REPORTS)
    assert "<script>" not in (tmp_path / "sweep.html").read_text()
    assert "&lt;script>\\|x" in (tmp_path / "sweep.md").read_text()


def parts(report: SweepReport) -> dict[str, str]:
    return {part.key: str(part.blocks) for part in sweep_document(report).sections}


def test_several_machines_are_warned_of_and_what_failed_says_why() -> None:
    one = made_cell("m", "a", "fp32", made_result(1.1, 15.0))
    other = made_cell("m", "b", "fp32", made_result(1.1, 15.0, machine="Xeon", threads=4))
    alone = parts(made_sweep([one]))
    assert "don't compare" not in alone["machines"]
    assert "failures" not in alone
    assert sweep_lead(made_sweep([one])) == "1 model x 1 plan x 1 precision: 1 cell, 1 done."
    both = parts(made_sweep([one, other, made_failure("m", "c", "fp32", "No layer 9.")]))
    assert "don't compare" in both["machines"]
    assert "Xeon, 4 threads: B" in both["machines"]
    assert "No layer 9. Take another plan." in both["failures"]
