"""Time: against an earlier session, or against the unpruned arm of the same one.

Absolute times of two sessions differ by the state of the machine. Both sessions time the same
unpruned model beside the candidate, in the same rounds; so what is compared is the candidate's time
relative to it, a ratio of two ratios, with the interval of both.
"""

from __future__ import annotations

from collections.abc import Mapping

from exporter.artifacts import FEWEST_ROUNDS, Check, ComparisonReport, LatencyRow
from exporter.gate.keys import rows_by_name
from exporter.gate.limits import Limits
from exporter.gate.verdicts import CheckedValue, checked, joined_floor, ratio_interval
from exporter.report.words import short_shape

_IMPORTED = "Timed by another tool, not in turns, on a machine that it doesn't name."
_TOO_FEW = "Too few rounds for a verdict."
_ONCE = "Loaded once: what its place in memory does to its speed is not in the interval."


def time_checks(
    report: ComparisonReport,
    baseline: ComparisonReport | None,
    limits: Limits,
    spreads: Mapping[str, float],
) -> list[Check]:
    """One check a shape and limit.

    Args:
        report: The candidate's report.
        baseline: An earlier one; None holds the candidate against its own unpruned arm.
        limits: ``max_slowdown``, ``min_speedup`` and ``noise_floor`` count here.
        spreads: By shape (``shape_name``), the share by which earlier sessions of one and the
            same candidate were seen to differ.
    """
    earlier = None if baseline is None else rows_by_name(baseline)
    checks = []
    for row in report.latency:
        floor = max(limits.noise_floor, spreads.get(row.shape_name, 0))
        if limits.max_slowdown is not None and (earlier is None or row.shape_name in earlier):
            before = None if earlier is None else earlier[row.shape_name]
            checks.append(checked(_slowdown(row, before, floor), 1 + limits.max_slowdown))
        if limits.min_speedup is not None:
            checks.append(checked(_speedup(row, floor), limits.min_speedup))
    return checks


def _slowdown(row: LatencyRow, before: LatencyRow | None, floor: float) -> CheckedValue:
    if before is None:
        own, (low, high) = row.speedup.ratio, _interval(row)
        return _time(
            row,
            before=row.baseline.median_ms,
            value=1 / own,
            ci95=(1 / high, 1 / low),
            noise_floor=max(floor, _measured_floor(row)),
            rounds=row.rounds,
            note=_note(row),
        )
    if _same_measurement(row, before):
        return _time(row, before=row.candidate.median_ms, value=1.0, ci95=(1.0, 1.0))
    old, new = before.speedup.ratio, row.speedup.ratio
    return _time(
        row,
        before=row.baseline.median_ms / old,
        value=old / new,
        ci95=ratio_interval(old, _interval(before), new, _interval(row)),
        noise_floor=max(floor, joined_floor(_measured_floor(before), _measured_floor(row))),
        rounds=min(row.rounds, before.rounds),
        note=_note(row, before),
    )


def _time(
    row: LatencyRow,
    *,
    before: float,
    value: float,
    ci95: tuple[float, float],
    noise_floor: float = 0.0,
    rounds: int = FEWEST_ROUNDS,
    note: str = "",
) -> CheckedValue:
    return CheckedValue(
        "time",
        short_shape(row),
        "ms",
        before=before,
        after=row.candidate.median_ms,
        value=value,
        ci95=ci95,
        noise_floor=noise_floor,
        doubt=_TOO_FEW if rounds < FEWEST_ROUNDS else "",
        note=note,
    )


def _speedup(row: LatencyRow, floor: float) -> CheckedValue:
    return CheckedValue(
        "speedup",
        short_shape(row),
        "ms",
        before=row.baseline.median_ms,
        after=row.candidate.median_ms,
        value=row.speedup.ratio,
        ci95=_interval(row),
        higher_is_better=True,
        noise_floor=max(floor, _measured_floor(row)),
        doubt=_TOO_FEW if row.rounds < FEWEST_ROUNDS else "",
        note=_note(row),
    )


def _note(*rows: LatencyRow) -> str:
    """What makes an interval less sure than it looks."""
    if any(row.imported for row in rows):
        return _IMPORTED
    return _ONCE if any(row.loads == 1 and row.builds == 1 for row in rows) else ""


def _interval(row: LatencyRow) -> tuple[float, float]:
    """One of at least 95 %.

    What the row's own verdict rests on allows for having looked more than once, but is one of 90 %
    where there was one look: a verdict speaks of one side.
    """
    own, judged = row.speedup.ci95, row.verdict_interval or row.speedup.ci95
    return min(own[0], judged[0]), max(own[1], judged[1])


def _measured_floor(row: LatencyRow) -> float:
    return 0.0 if row.noise_floor is None else row.noise_floor.ratio - 1


def _same_measurement(row: LatencyRow, before: LatencyRow) -> bool:
    """The same samples, and not two that happen to agree: nothing can have changed."""
    return (row.baseline, row.candidate, row.speedup) == (
        before.baseline,
        before.candidate,
        before.speedup,
    )
