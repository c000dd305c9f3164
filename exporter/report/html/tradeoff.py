"""What speed costs, of one report or of several on one plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from exporter.artifacts import ComparisonReport
from exporter.report.html.charts.pareto import SHAPES, Candidate, pareto_chart
from exporter.report.html.view import Figure, Section, Source
from exporter.report.parts.overview import (
    PHASE_NAMES,
    letter,
    mean_speedup,
    overview_grid,
    rows_by_phase,
)

Cost = tuple[str, str, Callable[[ComparisonReport], float]]
"""What it is, its unit, and how a report tells it."""


def tradeoff_section(sources: Sequence[Source], prefix: str = "") -> Section | None:
    """The plot; None where no quality or no speed is known of all reports."""
    cost = _common_cost([source.report for source in sources])
    phases = list(dict.fromkeys(row.phase for s in sources for row in s.report.latency))
    named = len(sources) > 1
    points = [p for i, s in enumerate(sources) if cost for p in _points(i, s, cost, phases, named)]
    if cost is None or not points:
        return None
    chart = pareto_chart(f"{prefix}tradeoff-chart", points, cost=cost[0], unit=cost[1])
    legend = [
        (f"s-{SHAPES[index % len(SHAPES)]}", PHASE_NAMES.get(phase, phase))
        for index, phase in enumerate(phases)
    ]
    joined = " The dashed line joins what nothing else beats in both." if named else ""
    caption = (
        "Better is further down and to the right. A phase of several shapes stands at the "
        "geometric mean of their speedups, its line from the least to the greatest; one of a "
        "single shape has its 95 % interval." + joined
    )
    table = [overview_grid({s.name: s.report for s in sources})] if named else []
    return Section("tradeoff", "What speed costs", [Figure(chart, caption, legend)], table)


def _points(
    index: int, source: Source, cost: Cost, phases: Sequence[str], named: bool
) -> Iterator[Candidate]:
    value = cost[2](source.report)
    speedups = {
        phase: mean_speedup(rows) for phase, rows in rows_by_phase(source.report.latency).items()
    }
    fastest = max(speedups, key=lambda phase: speedups[phase][0], default=None)
    for phase, (mean, low, high) in speedups.items():
        name = letter(index) if named and phase == fastest else ""
        yield Candidate(name, phases.index(phase), mean, low, high, value)


def _common_cost(reports: Sequence[ComparisonReport]) -> Cost | None:
    """The first quality that is a number in every report: perplexity, then KL divergence."""
    costs: tuple[Cost, ...] = (
        ("perplexity, change in % (less is better)", "%", _perplexity_change),
        ("KL divergence, nats (less is better)", "", _kl_divergence),
    )
    for cost in costs:
        if all(math.isfinite(cost[2](report)) for report in reports):
            return cost
    return None


def _perplexity_change(report: ComparisonReport) -> float:
    pair = report.accuracy.perplexity if report.accuracy else None
    return math.nan if pair is None else 100 * (pair.candidate / pair.baseline - 1)


def _kl_divergence(report: ComparisonReport) -> float:
    value = report.accuracy.kl_divergence if report.accuracy else None
    return math.nan if value is None else value
