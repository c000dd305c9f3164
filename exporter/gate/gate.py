"""One check, from reports and limits to a verdict on each quantity and on all."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from exporter.artifacts import (
    FEWEST_ROUNDS,
    Accuracy,
    Check,
    CheckReport,
    ComparisonReport,
    Drift,
    KeyDifferences,
    LatencyRow,
)
from exporter.artifacts.figures import LIMITED, Figure, Reading
from exporter.compare.intervals import mean_interval
from exporter.errors import RegressionError, UsageError
from exporter.gate.keys import key_of, refuse_unsound
from exporter.gate.limits import (
    AGAINST_BASELINE,
    CheckedValue,
    Interval,
    Limits,
    checked,
    difference_interval,
    joined_floor,
    overall,
    ratio_interval,
)
from exporter.report.words import short_shape

_TOO_FEW = "Too few rounds for a verdict."
_ONCE = (
    "The models were loaded once, so how their place in memory affects their speed is not in the "
    "interval."
)


_LACKING = (
    "This report has no such figure, and what it is held against has one: measure it again "
    "(depthcut compare), or write a new baseline (--update-baseline)."
)
_NEW = (
    "Only this report has such a figure: write a new baseline (--update-baseline), or leave the "
    "limit out."
)
_UNMEASURED = (
    "A limit is set, and no such figure was measured: measure it (depthcut compare), or leave the "
    "limit out."
)
_APART = "The reports have none of one shape: measure the baseline's (depthcut compare)."
_TWO_SESSIONS = (
    "Times of two sessions are compared relative to the unpruned arm, which both measured: a ratio "
    "of two ratios, with the interval of both."
)
_ONE_MEASUREMENT = (
    "Both reports hold the same measured times, so nothing can have changed: compare again "
    "(depthcut compare) after a change."
)
_NO_INTERVAL = "The report has no interval for it."


@dataclass(frozen=True)
class BaselineMatch:
    """An earlier report to compare with, and how its key differs from the new one's."""

    report: ComparisonReport
    differences: KeyDifferences = field(default_factory=dict)


@dataclass(frozen=True)
class History:
    """What the history tells."""

    # by shape, the share by which earlier sessions of this same candidate differed
    spreads: Mapping[str, float] = field(default_factory=dict)
    drift: Sequence[Drift] = ()
    notes: Sequence[str] = ()


def check(
    report: ComparisonReport,
    limits: Limits | None = None,
    *,
    baseline: BaselineMatch | None = None,  # None holds the candidate against its own unpruned arm
    history: History | None = None,
    name: str = "report",
) -> CheckReport:
    """Holds a report against limits.

    Args:
        report: What :func:`exporter.compare_models` gives.
        limits: What is allowed; None: what a baseline allows.
        baseline: An accepted report under the same conditions; None: the candidate is held against
            its own unpruned model.
        history: Earlier runs, by which a slow drift shows.
        name: What errors call the report.

    Returns:
        Each check with its interval, and as ``verdict`` the worst: ``improved``, ``within_limit``,
        ``regressed`` or ``inconclusive``. A figure that is missing is inconclusive.

    Raises:
        RegressionError: The limits are on nothing that the report holds, the report names a shape
            or a task twice, or its numbers contradict each other.
        UsageError: There is neither a limit nor a baseline.
    """
    history = history or History()
    refuse_unsound(report, name)
    old = None if baseline is None else baseline.report
    sides = _Sides(report, old, limits or Limits(), history.spreads)
    effective = _limits(old, sides.asked)
    accepted = {} if baseline is None else baseline.differences
    checks = [
        one
        for figure in LIMITED.values()
        for one in _checks(figure, sides, effective, any_shape="shapes" in accepted)
    ]
    if not checks:
        raise RegressionError(
            f"{name} holds nothing that the limits are on.", code="nothing-limited"
        )
    return CheckReport(
        verdict=overall([one.verdict for one in checks]),
        against="baseline_arm" if old is None else "baseline_report",
        models=judged_models(report, old),
        key=key_of(report),
        accepted_differences=accepted,
        checks=checks,
        drift=list(history.drift),
        notes=[
            *_notes(report, checks, old),
            *history.notes,
            *_contradictions(effective),
        ],
    )


@dataclass(frozen=True)
class _Sides:
    """The report, what it is held against, and what is known of the noise."""

    report: ComparisonReport
    baseline: ComparisonReport | None
    asked: Limits
    spreads: Mapping[str, float]

    def values(self, figure: Figure) -> tuple[dict[str, Any], dict[str, Any]]:
        """Rows or readings of a figure by what they are of: of the candidate, and of before."""
        if self.baseline is None:
            before, arm = self.report, self.report.arms.baseline
        else:
            before, arm = self.baseline, self.baseline.arms.candidate
        new = _by_subject(figure, self.report, self.report.arms.candidate)
        return new, _by_subject(figure, before, arm)


def _by_subject(figure: Figure, report: ComparisonReport, arm: Any) -> dict[str, Any]:
    """Rows of times, readings of all else; no counts of 0."""
    items: list[tuple[str, Any]] = [(short_shape(row), row) for row in report.latency]
    if figure.places:
        readings = figure.readings(report.accuracy, arm)
        items = [(one.subject, one) for one in readings if one.value or figure.stands_in != "arm"]
    result = dict(items)
    if len(result) < len(items):
        names = [subject for subject, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise RegressionError(
            f"The report has {figure.key} of {twice} twice.",
            "Measure again: a report has each shape and task once.",
            code="unsound",
        )
    return result


def _checks(figure: Figure, sides: _Sides, limits: Limits, *, any_shape: bool) -> Iterator[Check]:
    """A check of each value that a limit is on, without a verdict where it can't be compared.

    That is a value which only one side has, if a limit is on it or the baseline report has it, and
    one of which a limit was asked for and that neither side has. With ``any_shape`` one shape in
    common is enough; a speedup is of the report alone.
    """
    new, old = sides.values(figure)
    limit, judged = limits.on(figure.key), False
    alone = any_shape and figure.of_the_cut and not figure.places
    for subject in dict.fromkeys([*old, *new]):
        if subject in new and (subject in old or alone):
            if limit is not None:
                value = _value(figure, new[subject], old.get(subject), sides, limits)
                bound = figure.bound(limit, higher_is_better=value.higher_is_better)
                yield checked(value, bound)
            judged = True
        elif any_shape and not figure.places:
            continue
        elif limit is not None or (subject in old and sides.baseline is not None):
            judged = True
            yield _unknown(figure.key, subject, _NEW if subject in new else _LACKING)
    if not judged and (limits if new or old else sides.asked).on(figure.key) is not None:
        yield _unknown(figure.key, "any", _APART if new or old else _UNMEASURED + figure.needs)


def _value(figure: Figure, now: Any, then: Any, sides: _Sides, limits: Limits) -> CheckedValue:
    earlier = None if sides.baseline is None else then
    if not figure.places:
        floor = max(limits.noise_floor, sides.spreads.get(now.shape_name, 0))
        return _timed(figure, now, None if figure.of_the_cut else earlier, floor)
    if figure.of_the_cut:
        return CheckedValue(
            figure.key,
            now.subject,
            before=None,
            after=now.value,
            value=now.value,
            ci95=None if now.interval is None else now.interval.ci95,
            higher_is_better=figure.higher_is_better,
            doubt=_NO_INTERVAL if now.interval is None and math.isfinite(now.value) else "",
        )
    if figure.stands_in == "arm":  # counted, not measured
        ratio = now.value / then.value
        return CheckedValue(figure.key, now.subject, then.value, now.value, ratio)
    if figure.scale == "ratio":
        return _rise(figure, now, earlier, sides)
    return _difference(figure, now, earlier)


def _timed(
    figure: Figure, row: LatencyRow, before: LatencyRow | None, floor: float
) -> CheckedValue:
    """A speedup, or how many times as long a row takes as the unpruned arm, or as one before."""
    subject, after = short_shape(row), row.candidate.median_ms
    if before is not None and _same_measurement(row, before):
        return CheckedValue(figure.key, subject, after, after, 1.0, (1.0, 1.0))
    start, value, interval = row.baseline.median_ms, row.speedup.ratio, _interval(row)
    rows = [row]
    if before is not None:
        old = before.speedup.ratio
        interval = ratio_interval(old, _interval(before), value, interval)
        start, value, rows = start / old, old / value, [row, before]
    elif not figure.of_the_cut:
        value, interval = 1 / value, (1 / interval[1], 1 / interval[0])
    floors = (0.0 if one.noise_floor is None else one.noise_floor - 1 for one in rows)
    return CheckedValue(
        figure.key,
        subject,
        start,
        after,
        value,
        interval,
        higher_is_better=figure.higher_is_better,
        noise_floor=max(floor, functools.reduce(joined_floor, floors)),
        doubt=_TOO_FEW if min(one.rounds for one in rows) < FEWEST_ROUNDS else "",
        note=_ONCE if any(one.loads == one.builds == 1 for one in rows) else "",
    )


def _interval(row: LatencyRow) -> Interval:
    """One of at least 95 %.

    What the row's own verdict rests on allows for having looked more than once, but is one of 90 %
    where there was one look: a verdict speaks of one side.
    """
    own, judged = row.speedup.ci95, row.verdict_interval or row.speedup.ci95
    return min(own[0], judged[0]), max(own[1], judged[1])


def _same_measurement(row: LatencyRow, before: LatencyRow) -> bool:
    """The same samples, and not two that happen to agree: nothing can have changed."""
    return (row.baseline, row.candidate, row.speedup) == (
        before.baseline,
        before.candidate,
        before.speedup,
    )


def _unknown(quantity: str, subject: str, reason: str) -> Check:
    return Check(
        quantity=quantity, subject=subject, better="lower", verdict="inconclusive", reason=reason
    )


def judged_models(report: ComparisonReport, earlier: ComparisonReport | None) -> dict[str, str]:
    """Which models a check of a report is about, and of the earlier one it is held against."""
    arms = {"baseline": report.arms.baseline, "candidate": report.arms.candidate}
    arms |= {} if earlier is None else {"earlier": earlier.arms.candidate}
    return {name: arm.path for name, arm in arms.items()}


def _contradictions(limits: Limits) -> list[str]:
    slowdown, floor = limits.max_slowdown, limits.noise_floor
    if slowdown is None or floor <= slowdown:
        return []
    return [
        f"noise_floor {floor:.1%} is above --max-slowdown {slowdown:.1%}: no slowdown between "
        "them can be called a regression. Lower the one or raise the other."
    ]


def _notes(
    report: ComparisonReport, checks: Sequence[Check], old: ComparisonReport | None
) -> list[str]:
    arms = {"unpruned arm": report.arms.baseline, "candidate": report.arms.candidate}
    notes = [f"{name}: {arm.not_run}." for name, arm in arms.items() if arm.not_run is not None]
    notes += [
        f"{name}: {engine.path} was not checked against ONNX Runtime."
        for name, arm in arms.items()
        for engine in arm.engines
        if engine.check is None
    ]
    figures = [LIMITED[item.quantity] for item in checks]
    if old is not None and report.latency and report.latency == old.latency:
        return [*notes, _ONE_MEASUREMENT]
    if old is not None and any(not (figure.places or figure.of_the_cut) for figure in figures):
        notes.append(_TWO_SESSIONS)
    return notes


def _limits(baseline: ComparisonReport | None, limits: Limits) -> Limits:
    if not limits.empty:
        return limits
    if baseline is None:
        raise UsageError(
            "There is nothing to check: neither a limit nor a baseline is given.",
            "Give --baseline, or a limit such as --min-speedup 1.1.",
            code="nothing-to-check",
        )
    return replace(AGAINST_BASELINE, noise_floor=limits.noise_floor)


def _rise(figure: Figure, now: Reading, then: Reading | None, sides: _Sides) -> CheckedValue:
    log_ratio, interval = _log_rise(now)
    before, exact = now.before, False
    if then is not None:
        before, (old, old_ci95) = then.value, _log_rise(then)
        both = interval and old_ci95 and difference_interval(log_ratio, interval, old, old_ci95)
        assert sides.baseline is not None
        exact = _same_question(sides.report, sides.baseline)
        interval = None if exact else _paired(now.item, then.item) or both
        if log_ratio == old == math.inf:  # both collapsed
            exact, old, log_ratio = True, 0.0, 0.0
        log_ratio -= old
    return CheckedValue(
        figure.key,
        now.subject,
        before=before,
        after=now.value,
        value=_exp(log_ratio),
        ci95=None if interval is None else (_exp(interval[0]), _exp(interval[1])),
        doubt="" if interval or exact or math.isinf(log_ratio) else _NO_INTERVAL,
    )


def _log_rise(reading: Reading) -> tuple[float, Interval | None]:
    """Logarithm of the candidate's value over its unpruned arm's, and its interval."""
    interval = reading.interval
    assert reading.before is not None
    if not math.isfinite(reading.before):
        return math.nan, None
    has_overflowed = math.isinf(reading.value) and math.isfinite(reading.before)
    if interval is not None and has_overflowed:  # what the interval is of has not
        return interval.value, interval.ci95
    ratio = math.log(reading.value) - math.log(reading.before)
    return ratio, None if interval is None else interval.ci95


def _paired(now: Accuracy, then: Accuracy) -> Interval | None:
    """The interval from samples that both sessions judged; None where they aren't the same."""
    if now.sample_losses is None or then.sample_losses is None:
        return None
    mine, other = now.sample_losses, then.sample_losses
    if now.text_sha256 != then.text_sha256 or mine.tokens != other.tokens:
        return None
    increases = [np.subtract(one.candidate, one.baseline) for one in (mine, other)]
    interval = mean_interval(increases[0] - increases[1], np.array(mine.tokens, dtype=np.float64))
    return None if interval is None else interval.ci95


def _same_question(report: ComparisonReport, baseline: ComparisonReport) -> bool:
    mine, other = report.accuracy, baseline.accuracy
    assert mine is not None
    assert other is not None
    return (report.arms.candidate.sha256, mine.text_sha256, mine.tokens) == (
        baseline.arms.candidate.sha256,
        other.text_sha256,
        other.tokens,
    )


def _difference(figure: Figure, now: Reading, then: Reading | None) -> CheckedValue:
    assert now.interval is not None
    value, interval = now.interval.value, now.interval.ci95
    if then is not None:
        assert then.interval is not None
        old, same = then.interval, now.item.items == then.item.items
        interval = difference_interval(value, interval, old.value, old.ci95)
        value -= old.value
        if now.interval == old and same:
            interval = (0.0, 0.0)
    return CheckedValue(
        figure.key,
        now.subject,
        before=now.before if then is None else then.value,
        after=now.value,
        value=value,
        ci95=interval,
        higher_is_better=now.item.higher_is_better,
    )


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
