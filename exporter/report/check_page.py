"""A check as a page: what was held against which limit, and the history with its steps."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator

from exporter.artifacts import CheckReport, CheckVerdict, HistoryCurve
from exporter.report.charts.lines import Line, LinePoint, Lines
from exporter.report.checks import (
    VERDICT_WORDS,
    check_grid,
    conclusion,
    curve_name,
    model_lines,
    point_sentence,
    reasons,
    run_name,
    step_words,
)
from exporter.report.sections.blocks import (
    Block,
    Bullets,
    Document,
    Figure,
    Grid,
    Section,
    Sign,
    Tone,
    present,
)
from exporter.report.sparkline import sparkline

_SPARKS = 60
_LEAST_RANGE = 0.04
_TONES: dict[CheckVerdict, Tone] = {
    "regressed": "bad",
    "inconclusive": "unsure",
    "improved": "good",
    "within_limit": "even",
}


def check_document(found: CheckReport) -> Document:
    """A check, section by section."""
    sign = Sign(VERDICT_WORDS[found.verdict], _TONES[found.verdict])
    return Document(
        command="check",
        version=found.versions.get("depthcut", ""),
        title="depthcut check",
        subject=f"{found.key.backend}, {found.key.device}",
        lead=conclusion(found),
        sections=present([_checks(found), _history(found)]),
        signs=[sign],
    )


def _checks(found: CheckReport) -> Section:
    lists = [Bullets(lines) if lines else None for lines in (model_lines(found), reasons(found))]
    blocks: list[Block] = [each for each in (lists[0], check_grid(found), lists[1]) if each]
    return Section("checks", "Limits", blocks, stays_open=True)


def _history(found: CheckReport) -> Section | None:
    drawn = [curve for curve in found.curves if len(curve.runs) > 1]
    if not drawn:
        return None
    figures = [Figure(_chart(curve), _caption(curve), title=curve_name(curve)) for curve in drawn]
    return Section("history", "History", [], figures, stays_open=True)


def _caption(curve: HistoryCurve) -> str:
    told = [point_sentence(curve, point) for point in curve.points]
    return " ".join(told) if told else "No step was found."


def _chart(curve: HistoryCurve) -> Lines:
    values = [_shown(curve, value) for value in curve.values]
    runs = [
        LinePoint(n + 1, value, run_name(run.commit, run.time))
        for n, (value, run) in enumerate(zip(values, curve.runs, strict=True))
    ]
    levels = [
        Line("", "baseline", [LinePoint(a + 1, level), LinePoint(b, level)])
        for a, b, level in _levels(curve, values)
    ]
    up = "number" if curve.counted else "time relative to the unpruned model, % of its median"
    return Lines(
        curve_name(curve),
        [Line("", "candidate", runs), *(levels if curve.points else [])],
        "run",
        up,
        description=_caption(curve),
    )


def _shown(curve: HistoryCurve, value: float) -> float:
    return value if curve.counted else 100 * value


def _levels(curve: HistoryCurve, values: list[float]) -> Iterator[tuple[int, int, float]]:
    edges = [0, *(point.run for point in curve.points), len(values)]
    for begin, end in itertools.pairwise(edges):
        yield begin, end, statistics.mean(values[begin:end])


def history_grid(found: CheckReport) -> Grid:
    """A row a curve: its last runs as a line of text, and its steps."""
    rows = []
    for curve in found.curves:
        if len(curve.runs) < 2:
            continue
        first = max(0, len(curve.values) - _SPARKS)
        places = {point.run - first for point in curve.points}
        drawn = sparkline(
            curve.values[first:], places, least=0.0 if curve.counted else _LEAST_RANGE
        )
        steps = [
            f"{step_words(curve, point)} from {run_name(point.commit, point.time)} on"
            for point in curve.points
        ]
        rows.append([curve_name(curve), drawn, "; ".join(steps) or "none"])
    return Grid("History", ("history", "runs, oldest first", "steps"), rows)
