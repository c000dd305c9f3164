"""Time: against an earlier session, or against the unpruned arm of the same one.

Absolute times of two sessions differ by the state of the machine. Both sessions time the same
unpruned model beside the candidate, in the same rounds; so what is compared is the candidate's time
relative to it, a ratio of two ratios, with the interval of both.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

from exporter.artifacts import FEWEST_ROUNDS, Check, ComparisonReport, LatencyRow
from exporter.gate.keys import rows_by_name
from exporter.gate.limits import Limits
from exporter.gate.verdicts import CheckedValue, Interval, checked, joined_floor, ratio_interval
from exporter.report.words import short_shape

_TOO_FEW = "Too few rounds for a verdict."
_ONCE = (
    "The models were loaded once, so how their place in memory affects their speed is not in the "
    "interval."
)


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
        reported = _wider_than(row)
        return replace(
            _measured(row, floor=floor),
            before=row.baseline.median_ms,
            value=1 / row.speedup.ratio,
            ci95=_inverse(_interval(row)),
            reported_ci95=None if reported is None else _inverse(reported),
        )
    if _same_measurement(row, before):
        exact = _measured(row, floor=0.0)
        return replace(exact, before=row.candidate.median_ms, noise_floor=0.0, doubt="", note="")
    old, new = before.speedup.ratio, row.speedup.ratio
    return replace(
        _measured(row, before, floor=floor),
        before=row.baseline.median_ms / old,
        value=old / new,
        ci95=ratio_interval(old, _interval(before), new, _interval(row)),
    )


def _speedup(row: LatencyRow, floor: float) -> CheckedValue:
    return replace(
        _measured(row, floor=floor),
        quantity="speedup",
        before=row.baseline.median_ms,
        value=row.speedup.ratio,
        ci95=_interval(row),
        reported_ci95=_wider_than(row),
        higher_is_better=True,
    )


def _measured(*rows: LatencyRow, floor: float) -> CheckedValue:
    """The time of the first row's candidate, unchanged so far, and how sure these rows are."""
    measured_floor = functools.reduce(joined_floor, map(_measured_floor, rows))
    return CheckedValue(
        "time",
        short_shape(rows[0]),
        "ms",
        before=None,
        after=rows[0].candidate.median_ms,
        value=1.0,
        ci95=(1.0, 1.0),
        noise_floor=max(floor, measured_floor),
        doubt=_TOO_FEW if min(row.rounds for row in rows) < FEWEST_ROUNDS else "",
        note=_note(*rows),
    )


def _note(*rows: LatencyRow) -> str:
    """What makes an interval less sure than it looks."""
    return _ONCE if any(row.loads == 1 and row.builds == 1 for row in rows) else ""


def _interval(row: LatencyRow) -> Interval:
    """One of at least 95 %.

    What the row's own verdict rests on allows for having looked more than once, but is one of 90 %
    where there was one look: a verdict speaks of one side.
    """
    own, judged = row.speedup.ci95, row.verdict_interval or row.speedup.ci95
    return min(own[0], judged[0]), max(own[1], judged[1])


def _wider_than(row: LatencyRow) -> Interval | None:
    """The report's own interval, where the gate judges by a wider one."""
    own = row.speedup.ci95
    return None if _interval(row) == tuple(own) else own


def _inverse(interval: Interval) -> Interval:
    return 1 / interval[1], 1 / interval[0]


def _measured_floor(row: LatencyRow) -> float:
    return 0.0 if row.noise_floor is None else row.noise_floor.ratio - 1


def _same_measurement(row: LatencyRow, before: LatencyRow) -> bool:
    """The same samples, and not two that happen to agree: nothing can have changed."""
    return (row.baseline, row.candidate, row.speedup) == (
        before.baseline,
        before.candidate,
        before.speedup,
    )
