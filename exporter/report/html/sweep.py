"""A sweep's page: what speed costs, a drawing a model, then the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from exporter.artifacts import SweepReport
from exporter.report.html.charts.pareto import SHAPES, Candidate, pareto_chart
from exporter.report.html.study import render_study
from exporter.report.html.view import Figure, Section
from exporter.report.parts.overview import PHASE_NAMES, mean_gain
from exporter.report.parts.part import Command, Grid, Note, Part
from exporter.report.parts.sweep import TITLE, Row, finished, gain, sweep_lead, sweep_parts

Cost = tuple[str, str, Callable[[Row], float]]
_COSTS: tuple[Cost, ...] = (
    ("perplexity, change in % (less is better)", "%", lambda row: row.perplexity_change),
    ("KL divergence, nats (less is better)", "", lambda row: row.kl_divergence),
)
_LONG_TABLE = 24
_HOW = (
    "Better is further down and to the right, against the whole model in float. A phase of several "
    "shapes stands at the geometric mean of their gains, its line from the least to the greatest; "
    "one of a single shape has its 95 % interval. The dashed line joins what nothing else beats in "
    "both. Letters are those of the table."
)


def render_sweep(report: SweepReport) -> str:
    """The page; it runs no script and asks the network for nothing.

    Args:
        report: The sweep, finished or not.
    """
    sections = [_section(part) for part in sweep_parts(report)]
    if figures := list(_figures(report)):
        sections.insert(0, Section("tradeoff", "What speed costs", figures, [Note(_HOW)]))
    sections.append(Section("file", "The sweep's file", blocks=[Command(report.text.rstrip())]))
    return render_study(
        command="sweep",
        title=TITLE,
        subject=report.source,
        lead=sweep_lead(report),
        sections=sections,
        version=report.versions.get("depthcut", ""),
    )


def _section(part: Part) -> Section:
    """Long tables are opened by a click, but for the one that the page is for."""
    long = [block for block in part.blocks if isinstance(block, Grid) and _is_long(block)]
    folded = [] if part.key == "cells" else long
    blocks = [block for block in part.blocks if block not in folded]
    return Section(part.key, part.title, blocks=blocks, folded=folded)


def _is_long(grid: Grid) -> bool:
    return len(grid.rows) > _LONG_TABLE


def _figures(report: SweepReport) -> Iterator[Figure]:
    rows = finished(report)
    for number, model in enumerate(report.models):
        own = [row for row in rows if row.cell.model == model]
        cost = next((c for c in _COSTS if own and all(map(math.isfinite, map(c[2], own)))), None)
        if cost is not None:
            yield _figure(f"tradeoff-{number}", model, own, cost)


def _figure(key: str, model: str, rows: Sequence[Row], cost: Cost) -> Figure:
    phases = list(dict.fromkeys(s.phase for row in rows for s in row.result.shapes))
    points = [point for row in rows for point in _points(row, phases, cost[2](row))]
    legend = [
        (f"s-{SHAPES[index % len(SHAPES)]}", PHASE_NAMES.get(phase, phase))
        for index, phase in enumerate(phases)
    ]
    chart = pareto_chart(key, points, cost=cost[0], unit=cost[1])
    return Figure(chart, "", legend, title=model)


def _points(row: Row, phases: Sequence[str], cost: float) -> Iterator[Candidate]:
    gains = {
        phase: mean_gain([gain(shape) for shape in row.result.shapes if shape.phase == phase])
        for phase in dict.fromkeys(shape.phase for shape in row.result.shapes)
    }
    fastest = max(gains, key=lambda phase: gains[phase][0], default=None)
    for phase, (mean, low, high) in gains.items():
        name = row.letter if phase == fastest else ""
        yield Candidate(name, phases.index(phase), mean, low, high, cost)
