"""Pruning at several depths, as Markdown and as a page. No PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import DepthCell, DepthsInt8, DepthsReport
from exporter.cli import run
from exporter.report.files import page as render
from exporter.report.files import write_study
from exporter.report.sections.depths import depths_document, least_kl
from tests.made_tables import damage, made_answer, made_depths
from tests.reading import Page


def test_the_least_harm_is_told_by_intervals_alone() -> None:
    report = made_depths()
    ways = {number: [cell.way for cell in least_kl(report, number)] for number in report.numbers}
    # Alike at 1: the way that says more of what was dropped comes first.
    assert ways == {1: ["attention", "joint"], 2: ["joint", "attention"]}  # 0.12-0.18, 0.16-0.24
    lead = depths_document(report).lead
    assert "n = 2: can't tell Joint Layer Drop (0.15 nats, perplexity 1.40x) from Attention" in lead
    apart = [cell for cell in report.cells if cell.way != "attention"]
    assert [cell.way for cell in least_kl(with_cells(apart), 2)] == ["joint"]
    assert "n = 2: Joint Layer Drop (" in depths_document(with_cells(apart)).lead
    unsure = [without_interval(cell) for cell in apart]
    assert [cell.way for cell in least_kl(with_cells(unsure), 2)] == ["joint", "mlp"]


def with_cells(cells: list[DepthCell]) -> DepthsReport:
    return made_depths().model_copy(update={"cells": cells})


def without_interval(cell: DepthCell) -> DepthCell:
    damage = cell.damage and cell.damage.model_copy(update={"kl_ci95": None})
    return cell.model_copy(update={"damage": damage})


def test_a_lead_without_damage() -> None:
    nothing = made_depths().model_copy(update={"cells": [made_depths().of_way("block")[1]]})
    assert depths_document(nothing).lead == "Nothing could be dropped at these numbers."
    assert "Nothing could be dropped" in Page(render([depths_document(nothing)])).text


def test_markdown_has_every_cell(tmp_path: Path) -> None:
    write_study(made_depths(), tmp_path / "depths.json")
    assert DepthsReport.read(tmp_path / "depths.json").cells == made_depths().cells
    text = (tmp_path / "depths.md").read_text()
    assert "- block of 2: The plan drops everything." in text
    assert "| attention | 1 | 22.00 | 1.10x [0.990, 1.21] |" in text
    assert "| joint | 2 | -2.0 % | attention 0; MLP 1 |" in text
    assert "where the whole model's perplexity is 20.00;" in text
    assert "words, acc: the whole model has 0.500 on 12 items." in text
    assert "| MLP Drop | 0.400 [-0.200, +0.000] | 0.300 [-0.300, -0.100] |" in text


def test_the_answer_comes_first_with_its_reason(tmp_path: Path) -> None:
    write_study(made_answer(), tmp_path / "depths.json")
    assert DepthsReport.read(tmp_path / "depths.json").recommended == made_answer().cells[0]
    text = (tmp_path / "depths.md").read_text()
    assert text.index("How much may I drop?") < text.index("| way | n |")
    rows = [line for line in text.splitlines() if line.startswith("| 1 attention |")]
    figures = ("1.09x", "1.04x", "+10.0 %", "+1.2 %", "+20.0 %", "+3.4 %", "recommended")
    assert all(figure in rows[0] for figure in figures)
    assert sum("recommended" in line for line in text.splitlines() if line.startswith("|")) == 1
    assert "There is no product." in text
    lead = depths_document(made_answer()).lead
    assert "1.06 times as fast" in lead
    assert "2.0 %" in lead


def test_int8_stands_beside_the_cuts_or_says_why_not() -> None:
    without: Any = made_answer()
    int8 = DepthsInt8(
        bytes_removed=0.715,
        perplexity_ratio=1.004,
        other_perplexity_ratio=1.006,
        speedups={"prefill": 1.15, "decode": 2.46, "request": 1.6},
    )

    def section(**told: Any) -> tuple[list[list[Any]], str]:
        answer = without.answer.model_copy(update=told)
        grid, *notes = (
            depths_document(without.model_copy(update={"answer": answer})).sections[0].blocks
        )
        return grid.rows, " ".join(note.text for note in notes)

    rows, words = section(int8=int8)
    assert [rows[-1][n] for n in (1, 2, 3, 4, 6)] == [
        "-71.5 %", "1.15x", "2.46x", "+0.4 %", "+0.6 %",
    ]  # fmt: skip
    assert "--quantize int8" in words
    fewer, reason = section(no_int8="the extra genai is not installed")
    assert len(fewer) == len(rows) - 1
    assert "the extra genai is not installed" in reason


@pytest.mark.parametrize(
    ("healed", "ends", "told"),
    [
        (1.05, (1.021, 1.08), ("+5.0 %", "--at-most")),
        (1.05, (1.019, 1.08), ("+5.0 %", "+1.9 %", "--eval-tokens")),
        (1.012, (0.911, 1.113), ("+1.2 %", "-8.9 %", "--eval-tokens")),
    ],
)
def test_where_nothing_keeps_the_limit_the_next_step_is_told(
    healed: float, ends: tuple[float, float], told: tuple[str, ...]
) -> None:
    report = made_answer(None)
    cost = damage(healed, 0.01).model_copy(update={"perplexity_ratio_ci95": ends})
    cells = [
        cell if cell.healed is None else cell.model_copy(update={"healed": cost})
        for cell in report.cells
    ]
    report = report.model_copy(update={"cells": cells})
    assert report.recommended is None
    lead = depths_document(report).lead
    assert all(text in lead for text in told)
    assert "recommended" not in str(depths_document(report).sections[0].blocks[0])


def test_a_cut_that_keeps_the_limit_but_is_not_faster_asks_for_no_more_text() -> None:
    report = made_answer(None)
    sure = damage(1.005, 0.01).model_copy(update={"perplexity_ratio_ci95": (1.001, 1.009)})
    cells = [cell if cell.healed is None else cell.model_copy(update={"healed": sure})
             for cell in report.cells]  # fmt: skip
    lead = depths_document(report.model_copy(update={"cells": cells})).lead
    assert "1 attention," in lead
    assert "2.0 %" in lead
    assert not any(option in lead for option in ("--eval-tokens", "--at-most", "--time"))


def test_the_page_is_whole_and_escaped() -> None:
    text = render([depths_document(made_depths(text="<script>alert(1)</script>"))])
    assert "<script" not in text
    assert len(Page(text).all("table")) == len(Page(text).all("caption")) > 1


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
