"""Several reports side by side: a row each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from exporter.artifacts import ComparisonReport, LatencyRow
from exporter.report.parts.part import Grid
from exporter.report.words import headline, relative_change, significant

PHASE_NAMES = {"first_token": "first token", "per_token": "per token", "generate": "generation"}


def overview_grid(reports: Mapping[str, ComparisonReport]) -> Grid:
    """What each report dropped, and what that did."""
    phases = list(dict.fromkeys(row.phase for r in reports.values() for row in r.latency))
    header = [
        "candidate", "report", "what", *(f"{PHASE_NAMES.get(p, p)}, speedup" for p in phases),
        "perplexity", "KL, nats", "parameters",
    ]  # fmt: skip
    rows = [
        [letter(index), name, *_row(report, phases)]
        for index, (name, report) in enumerate(reports.items())
    ]
    return Grid("All candidates", header, rows, right=range(3, len(header)))


def letter(index: int) -> str:
    """A candidate's letter: A to Z, then A1 and so on."""
    round_, place = divmod(index, 26)
    return chr(ord("A") + place) + (str(round_) if round_ else "")


def rows_by_phase(rows: Sequence[LatencyRow]) -> dict[str, list[LatencyRow]]:
    """The rows of each phase, in the report's order."""
    found: dict[str, list[LatencyRow]] = {}
    for row in rows:
        found.setdefault(row.phase, []).append(row)
    return found


def mean_speedup(rows: Sequence[LatencyRow]) -> tuple[float, float, float]:
    """The geometric mean of the ratios, and the range about it; of one row, its interval."""
    return mean_gain([(row.speedup.ratio, *row.speedup.ci95) for row in rows])


def mean_gain(gains: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """The same of ratios, each with the ends of its interval."""
    if len(gains) == 1:
        return gains[0]
    ratios = [ratio for ratio, _, _ in gains]
    mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    return mean, min(ratios), max(ratios)


def _row(report: ComparisonReport, phases: Sequence[str]) -> list[str]:
    accuracy, arms, by_phase = report.accuracy, report.arms, rows_by_phase(report.latency)
    pair = accuracy.perplexity if accuracy else None
    kl_divergence = accuracy.kl_divergence if accuracy else None
    return [
        headline(report),
        *(f"{mean_speedup(by_phase[p])[0]:.3f}x" if p in by_phase else "-" for p in phases),
        "-" if pair is None else relative_change(pair.baseline, pair.candidate),
        "-" if kl_divergence is None else significant(kl_divergence, 3),
        relative_change(arms.baseline.parameters, arms.candidate.parameters),
    ]
