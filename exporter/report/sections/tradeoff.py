"""What speed costs: one report's phases, several reports, or a sweep's cells, on one plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from exporter.artifacts import ComparisonReport
from exporter.report.chart_tradeoff import Candidate, TradeOff, series_mark
from exporter.report.sections.blocks import Figure, Grid, Section
from exporter.report.sections.verdict import headline
from exporter.report.words import PHASES, or_dash, relative_change, significant

Gain = tuple[float, float, float]
"""A speedup, and the range about it."""
COSTS = (
    ("perplexity, change in % (less is better)", "%"),
    ("KL divergence, nats (less is better)", ""),
)
HOW = (
    "Better is further down and to the right. A phase of several shapes stands at the geometric "
    "mean of their speedups, its line from the least to the greatest; one of a single shape has "
    "its 95 % interval."
)
JOINED = " The dashed line joins what nothing else beats in both."


class Traded(NamedTuple):
    """A candidate: its letter, its gains by phase, and its costs in the order of ``COSTS``."""

    letter: str
    gains: Mapping[str, Sequence[Gain]]
    costs: Sequence[float]


def letter(index: int) -> str:
    """A candidate's letter: A to Z, then A1 and so on."""
    round_, place = divmod(index, 26)
    return chr(ord("A") + place) + (str(round_) if round_ else "")


def mean_gain(gains: Sequence[Gain]) -> Gain:
    """The geometric mean of the ratios, and the range about it; of one ratio, its interval."""
    if len(gains) == 1:
        return gains[0]
    ratios = [ratio for ratio, _, _ in gains]
    mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    return mean, min(ratios), max(ratios)


def tradeoff_figure(traded: Sequence[Traded], caption: str, title: str = "") -> Figure | None:
    """The plot, by the first cost that is a number for all; None where none is, or no speed."""
    finite = [n for n in range(len(COSTS)) if all(math.isfinite(t.costs[n]) for t in traded)]
    phases = list(dict.fromkeys(phase for one in traded for phase in one.gains))
    if not finite or not phases:
        return None
    points = []
    for one in traded:
        gains = {phase: mean_gain(item) for phase, item in one.gains.items()}
        fastest = max(gains, key=lambda phase: gains[phase][0], default=None)
        for phase, gain in gains.items():
            name = one.letter if phase == fastest else ""
            points.append(Candidate(name, phases.index(phase), *gain, one.costs[finite[0]]))
    legend = [(f"s-{series_mark(n)}", PHASES.get(phase, phase)) for n, phase in enumerate(phases)]
    chart = TradeOff("What speed costs", points, "speedup (more is better)", COSTS[finite[0]])
    return Figure(chart, caption, legend, title)


def tradeoff_section(report: ComparisonReport) -> Section | None:
    """The plot of one report; None where its speed or quality is not known."""
    figure = tradeoff_figure([Traded("", _gains(report), _costs(report))], HOW)
    return None if figure is None else Section("tradeoff", "What speed costs", [], [figure])


def overview_section(reports: Mapping[str, ComparisonReport]) -> Section:
    """Several reports in one plot and in a table."""
    traded = [
        Traded(letter(index), _gains(report), _costs(report))
        for index, report in enumerate(reports.values())
    ]
    figure = tradeoff_figure(traded, HOW + JOINED)
    figures = [] if figure is None else [figure]
    grid = overview_grid(reports)
    return Section("overview", "All candidates", [grid], figures, stays_open=True)


def overview_grid(reports: Mapping[str, ComparisonReport]) -> Grid:
    """Several reports side by side: what each dropped, and what that did."""
    phases = list(dict.fromkeys(row.phase for r in reports.values() for row in r.latency))
    header = [
        "candidate", "report", "what", *(f"{PHASES.get(p, p)}, speedup" for p in phases),
        "perplexity", "KL, nats", "parameters",
    ]  # fmt: skip
    rows = [
        [letter(index), name, *_row(report, phases)]
        for index, (name, report) in enumerate(reports.items())
    ]
    return Grid("All candidates", header, rows, right=range(3, len(header)))


def _row(report: ComparisonReport, phases: Sequence[str]) -> list[str]:
    accuracy, arms, gains = report.accuracy, report.arms, _gains(report)
    mean: Callable[[Sequence[Gain]], str] = lambda item: f"{mean_gain(item)[0]:.3f}x"  # noqa: E731
    pair = accuracy.perplexity if accuracy else None
    kl_divergence = accuracy.kl_divergence if accuracy else None
    return [
        headline(report),
        *(or_dash(gains.get(phase), mean) for phase in phases),
        or_dash(pair, lambda p: relative_change(p.baseline, p.candidate)),
        or_dash(kl_divergence, lambda kl: significant(kl, 3)),
        relative_change(arms.baseline.parameters, arms.candidate.parameters),
    ]


def _gains(report: ComparisonReport) -> dict[str, list[Gain]]:
    gains: dict[str, list[Gain]] = {}
    for row in report.latency:
        gains.setdefault(row.phase, []).append((row.speedup.ratio, *row.speedup.ci95))
    return gains


def _costs(report: ComparisonReport) -> tuple[float, float]:
    accuracy = report.accuracy
    pair = accuracy.perplexity if accuracy else None
    kl_divergence = accuracy.kl_divergence if accuracy else None
    return (
        math.nan if pair is None else 100 * (pair.candidate / pair.baseline - 1),
        math.nan if kl_divergence is None else kl_divergence,
    )
