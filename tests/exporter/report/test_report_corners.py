"""Whole and cut, in float and quantised, as people read them, and how each graph is written."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from exporter.artifacts import ComparisonReport
from exporter.report.markdown import section_markdown
from exporter.report.sections.latency import corners_section
from exporter.report.sections.model import forms_section
from exporter.report.sections.verdict import headline
from exporter.report.terminal import comparison_grids, drawn_table
from tests.made_reports import as_markdown, as_page, as_text, full_report, gate_report


@pytest.fixture(scope="module")
def report() -> ComparisonReport:
    return full_report(rows=2, samples=24)


def test_the_table_has_a_row_a_model(report: ComparisonReport) -> None:
    part = corners_section(report)
    assert part is not None
    text = section_markdown(part)
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert [name[2:] for name in rows][-4:] == [
        "whole, fp32", "cut, fp32", "whole, int8", "cut, int8",
    ]  # fmt: skip
    assert "1.19x [1.15, 1.24] | faster |" in rows["| cut, fp32"]
    assert "| 17.71, +10.3 % [+5.1, +16.2] | 0.150 | 85.0 % | 25.0 % |" in rows["| cut, fp32"]
    assert rows["| cut, int8"].endswith("| 125.0 |")
    assert "| 16.20 | 0.0100 | 96.0 % | 75.0 % |" in rows["| whole, int8"]
    assert corners_section(gate_report()) is None


def test_what_was_measured_of_no_corner_is_left_out(report: ComparisonReport) -> None:
    none = {"exact_match": None, "embedding_cosine": None}
    corners = [corner.model_copy(update=none) for corner in report.corners]
    text = as_markdown(report.model_copy(update={"corners": corners}))
    assert "| same continuation |" not in text
    assert "| cosine of embeddings |" not in text
    assert "| same top-1 token |" in text


def test_every_form_of_the_report_has_them(report: ComparisonReport) -> None:
    assert "## All models" in as_markdown(report)
    assert ">All models</h2>" in as_page(report)
    plain = as_text(report).splitlines()
    assert any(line.split()[:2] == ["cut,", "int8"] and "3.10x" in line for line in plain)
    screen = io.StringIO()
    for grid in comparison_grids(report)[1:]:
        Console(file=screen, width=80).print(drawn_table(grid))
    assert "cut, int8" in screen.getvalue()
    assert "3.10x [3.06, 3.15]" in screen.getvalue()
    without = gate_report()
    assert len(comparison_grids(without)) == 1
    assert "All models" not in as_text(without) + as_markdown(without) + as_page(without)


def test_the_page_shows_the_table_unfolded_however_many_shapes_there_are() -> None:
    page = as_page(full_report(rows=5, samples=24))
    assert "<summary>Table: All models" not in page
    assert "<summary>Table: Latency of each arm" in page


def test_forms_and_weights_of_all_arms_are_told(report: ComparisonReport) -> None:
    part = forms_section(report)
    assert part is not None
    text = section_markdown(part)
    assert (
        "| candidate | onnxruntime-cpu (genai wikitext-2, fused norms) | 30 GroupQueryAttention, "
        "60 wikitext-2 | int8 (rtn, blocks of 32, symmetric, accuracy level 4, embedding of 8 "
        "bits, head of 8 bits, calibrated on wikitext-2) | 211 of 8 bits |" in text
    )
    assert "| float candidate | - | - | fp32 | - |" in text
    assert "**Form of baseline, candidate, float baseline:** Nothing faster" in text
    assert forms_section(gate_report()) is None


def test_the_headline_says_into_what_both_are_quantised(report: ComparisonReport) -> None:
    assert headline(report).endswith("1 block, in int8")
    arms = report.arms
    baseline = arms.baseline.model_copy(update={"quantization": None})
    other = report.model_copy(update={"arms": arms.model_copy(update={"baseline": baseline})})
    assert headline(other).endswith("1 block")
