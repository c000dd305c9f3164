"""What speed costs, of one report or of several on one plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from exporter.artifacts import ComparisonReport, LatencyRow
from exporter.report.html.charts.pareto import SHAPES, Candidate, pareto_chart
from exporter.report.html.view import Figure, Section, Source
from exporter.report.parts.part import Grid
from exporter.report.words import headline, relative_change, significant

_NAMES = {"first_token": "first token", "per_token": "per token", "generate": "generation"}
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
        (f"s-{SHAPES[index % len(SHAPES)]}", _NAMES.get(phase, phase))
        for index, phase in enumerate(phases)
    ]
    joined = " The dashed line joins what nothing else beats in both." if named else ""
    caption = (
        "Better is further down and to the right. A phase of several shapes stands at the "
        "geometric mean of their speedups, its line from the least to the greatest; one of a "
        "single shape has its 95 % interval." + joined
    )
    table = [_overview(sources)] if named else []
    return Section("tradeoff", "What speed costs", [Figure(chart, caption, legend)], table)


def letter(index: int) -> str:
    """A candidate's letter: A to Z, then A1 and so on."""
    round_, place = divmod(index, 26)
    return chr(ord("A") + place) + (str(round_) if round_ else "")


def _points(
    index: int, source: Source, cost: Cost, phases: Sequence[str], named: bool
) -> Iterator[Candidate]:
    value = cost[2](source.report)
    speedups = {phase: _speedup(rows) for phase, rows in _by_phase(source.report.latency).items()}
    for phase, (mean, low, high) in speedups.items():
        is_last = mean == max(speedup[0] for speedup in speedups.values())
        name = letter(index) if named and is_last else ""
        yield Candidate(name, phases.index(phase), mean, low, high, value)


def _by_phase(rows: Sequence[LatencyRow]) -> dict[str, list[LatencyRow]]:
    found: dict[str, list[LatencyRow]] = {}
    for row in rows:
        found.setdefault(row.phase, []).append(row)
    return found


def _speedup(rows: Sequence[LatencyRow]) -> tuple[float, float, float]:
    """The geometric mean of the ratios, and the range that is drawn about it."""
    ratios = [row.speedup.ratio for row in rows]
    if len(rows) == 1:
        return ratios[0], *rows[0].speedup.ci95
    mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    return mean, min(ratios), max(ratios)


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


def _overview(sources: Sequence[Source]) -> Grid:
    phases = list(dict.fromkeys(row.phase for s in sources for row in s.report.latency))
    header = [
        "candidate", "report", "what", *(f"{_NAMES.get(p, p)}, speedup" for p in phases),
        "perplexity", "KL, nats", "parameters",
    ]  # fmt: skip
    rows = [_overview_row(index, source, phases) for index, source in enumerate(sources)]
    return Grid("All candidates", header, rows, right=range(3, len(header)))


def _overview_row(index: int, source: Source, phases: Sequence[str]) -> list[str]:
    report, by_phase = source.report, _by_phase(source.report.latency)
    accuracy, arms = report.accuracy, report.arms
    pair = accuracy.perplexity if accuracy else None
    kl_divergence = accuracy.kl_divergence if accuracy else None
    return [
        letter(index),
        source.name,
        headline(report),
        *(f"{_speedup(by_phase[p])[0]:.3f}x" if p in by_phase else "-" for p in phases),
        "-" if pair is None else relative_change(pair.baseline, pair.candidate),
        "-" if kl_divergence is None else significant(kl_divergence, 3),
        relative_change(arms.baseline.parameters, arms.candidate.parameters),
    ]
