"""One check, from reports and limits to a verdict on each quantity and on all."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from exporter.artifacts import (
    FEWEST_ROUNDS,
    Accuracy,
    Check,
    CheckReport,
    ComparisonReport,
    Drift,
    JudgedModels,
    KeyDifference,
    LatencyRow,
    Quantity,
    TaskResult,
)
from exporter.artifacts.accuracy import AgreementFigure
from exporter.compare.intervals import mean_interval
from exporter.errors import RegressionError, UsageError
from exporter.gate.keys import key_of, refuse_unsound, rows_by_name
from exporter.gate.limits import (
    AGAINST_BASELINE,
    LIMIT_ON,
    UNPRUNED,
    CheckedValue,
    Interval,
    Limits,
    checked,
    counts,
    difference_interval,
    figures,
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


def time_checks(
    report: ComparisonReport,
    baseline: ComparisonReport | None,  # None holds the candidate against its own unpruned arm
    limits: Limits,
    spreads: Mapping[str, float],
) -> list[Check]:
    """One check a shape and limit."""
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
        return replace(
            _measured(row, floor=floor),
            before=row.baseline.median_ms,
            value=1 / row.speedup.ratio,
            ci95=_inverse(_interval(row)),
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


@dataclass(frozen=True)
class BaselineMatch:
    """An earlier report to compare with, and how its key differs from the new one's."""

    report: ComparisonReport
    differences: Sequence[KeyDifference] = ()


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
        RegressionError: The limits are on nothing that the report holds.
    """
    history = history or History()
    refuse_unsound(report, name)
    old = None if baseline is None else baseline.report
    result = limits or Limits()
    limits = _limits(old, result)
    missing = _missing(report, baseline, limits, result)
    unknown = [(one.quantity, one.subject) for one in missing]
    judged = [
        *time_checks(report, old, limits, history.spreads),
        *accuracy_checks(report, old, limits),
        *_size_checks(report, old, limits),
    ]
    checks = [*(one for one in judged if (one.quantity, one.subject) not in unknown), *missing]
    if not checks:
        raise RegressionError(
            f"{name} holds nothing that the limits are on.", code="nothing-limited"
        )
    return CheckReport(
        verdict=overall([one.verdict for one in checks]),
        against="baseline_arm" if old is None else "baseline_report",
        models=judged_models(report, old),
        key=key_of(report),
        accepted_differences=[] if baseline is None else list(baseline.differences),
        checks=checks,
        drift=list(history.drift),
        notes=[
            *_notes(report, checks, two_sessions=old is not None),
            *history.notes,
            *_contradictions(limits),
        ],
    )


def _missing(
    report: ComparisonReport, baseline: BaselineMatch | None, limits: Limits, value: Limits
) -> list[Check]:
    """A check without a verdict for each figure that can't be compared.

    That is one which only one side has, if a limit is on it or the baseline report has it, and one
    of which a limit was asked for and that neither side has. Where the caller accepts other shapes,
    one in common is enough.
    """
    before = report if baseline is None else baseline.report
    unpruned = report.arms.baseline
    old = figures(before, unpruned if baseline is None else before.arms.candidate)
    new = figures(report, report.arms.candidate)
    common = {LIMIT_ON[quantity] for quantity, subject in new if (quantity, subject) in old}
    accepted = [] if baseline is None else [one.field for one in baseline.differences]
    checks = []
    for figure in dict.fromkeys([*old, *new]):
        limit, lacking = LIMIT_ON[figure[0]], figure not in new
        wanted = getattr(limits, limit) is not None or (lacking and baseline is not None)
        if (
            (lacking or figure not in old)
            and wanted
            and not ("shapes" in accepted and figure[0] in ("time", "speedup"))
        ):
            common.add(limit)
            checks.append(_unknown(*figure, _LACKING if lacking else _NEW))
    names = {LIMIT_ON[quantity] for quantity, _ in [*old, *new]}
    for quantity, limit in LIMIT_ON.items():
        if getattr(limits if limit in names else value, limit) is not None and limit not in common:
            common.add(limit)
            reason = _APART if limit in names else _UNMEASURED
            checks.append(_unknown(quantity, "any", reason))
    return checks


def _unknown(quantity: Quantity, subject: str, reason: str) -> Check:
    return Check(
        quantity=quantity,
        subject=subject,
        scale="ratio",
        better="lower",
        unit="",
        before=None,
        after=None,
        value=None,
        ci95=None,
        limit=None,
        noise_floor=0,
        verdict="inconclusive",
        reason=reason,
    )


def judged_models(report: ComparisonReport, earlier: ComparisonReport | None) -> JudgedModels:
    """Which models a check of a report is about, and of the earlier one it is held against."""
    return JudgedModels(
        baseline=report.arms.baseline.path,
        candidate=report.arms.candidate.path,
        earlier=None if earlier is None else earlier.arms.candidate.path,
    )


def _contradictions(limits: Limits) -> list[str]:
    slowdown, floor = limits.max_slowdown, limits.noise_floor
    if slowdown is None or floor <= slowdown:
        return []
    return [
        f"noise_floor {floor:.1%} is above --max-slowdown {slowdown:.1%}: no slowdown between "
        "them can be called a regression. Lower the one or raise the other."
    ]


def _size_checks(
    report: ComparisonReport, baseline: ComparisonReport | None, limits: Limits
) -> list[Check]:
    """Files, engines, nodes, KV cache and device memory: they are counted, not measured."""
    before = report.arms.baseline if baseline is None else baseline.arms.candidate
    old, checks = counts(before), []
    for figure, new in counts(report.arms.candidate).items():
        limit = getattr(limits, LIMIT_ON[figure[0]])
        if limit is not None and figure in old:
            ratio = new / old[figure]
            unit = "" if figure[0] == "nodes" else "bytes"
            grown = CheckedValue(*figure, unit, before=old[figure], after=new, value=ratio)
            checks.append(checked(grown, 1 + limit))
    return checks


def _notes(report: ComparisonReport, checks: Sequence[Check], *, two_sessions: bool) -> list[str]:
    """What a reader of the verdicts must know."""
    arms = {"unpruned arm": report.arms.baseline, "candidate": report.arms.candidate}
    notes = [f"{name}: {arm.not_run}." for name, arm in arms.items() if arm.not_run is not None]
    if two_sessions and any(item.quantity == "time" for item in checks):
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


_NO_INTERVAL = "The report has no interval for it."


def accuracy_checks(
    report: ComparisonReport, baseline: ComparisonReport | None, limits: Limits
) -> list[Check]:
    """One check a limit that is set on what was measured; one a task."""
    checks = []
    if limits.max_perplexity_increase is not None and has_perplexity(report, baseline or report):
        increase = _perplexity(report, baseline)
        checks.append(checked(increase, 1 + limits.max_perplexity_increase))
    for figure in [] if report.accuracy is None else report.accuracy.agreement:
        if (limit := getattr(limits, LIMIT_ON[figure.key])) is not None:
            checks.append(checked(_against_the_unpruned_arm(figure), limit))
    if (drop := limits.max_task_drop) is not None:
        for score in _scores(report, baseline):
            checks.append(checked(score, drop if not score.higher_is_better else -drop))
    return checks


def has_perplexity(*reports: ComparisonReport) -> bool:
    """Whether there is a perplexity in all of them."""
    return all(one.accuracy is not None and one.accuracy.perplexity is not None for one in reports)


def _against_the_unpruned_arm(figure: AgreementFigure) -> CheckedValue:
    key, value, interval = figure
    higher = figure.higher_is_better
    return CheckedValue(
        key,
        UNPRUNED,
        "" if higher else "nats",
        before=None,
        after=value,
        value=value,
        ci95=None if interval is None else interval.ci95,
        scale="difference",
        higher_is_better=higher,
        unchanged=1.0 if higher else 0.0,
        doubt=_NO_INTERVAL if interval is None and math.isfinite(value) else "",
    )


def _perplexity(report: ComparisonReport, baseline: ComparisonReport | None) -> CheckedValue:
    after = _candidate_perplexity(report)
    now, interval = _increase(report)
    if baseline is None:
        assert report.accuracy is not None
        assert report.accuracy.perplexity is not None
        before, log_ratio, exact = report.accuracy.perplexity.baseline, now, False
    else:
        then, then_ci95 = _increase(baseline)
        before, log_ratio = _candidate_perplexity(baseline), now - then
        exact = _same_question(report, baseline)
        both = interval and then_ci95 and difference_interval(now, interval, then, then_ci95)
        interval = None if exact else _paired(report.accuracy, baseline.accuracy) or both
    if math.isnan(log_ratio):  # both collapsed: infinite then and now
        log_ratio, exact = 0.0, True
    return CheckedValue(
        "perplexity",
        "evaluation text",
        "",
        before=before,
        after=after,
        value=_exp(log_ratio),
        ci95=None if interval is None else (_exp(interval[0]), _exp(interval[1])),
        doubt="" if interval or exact or math.isinf(log_ratio) else _NO_INTERVAL,
    )


def _candidate_perplexity(report: ComparisonReport) -> float:
    assert report.accuracy is not None
    assert report.accuracy.perplexity is not None
    return report.accuracy.perplexity.candidate


def _increase(report: ComparisonReport) -> tuple[float, tuple[float, float] | None]:
    """Logarithm of the candidate's perplexity over its unpruned arm's, and its interval."""
    accuracy = report.accuracy
    assert accuracy is not None
    assert accuracy.perplexity is not None
    pair, interval = accuracy.perplexity, accuracy.log_perplexity_increase
    if interval is not None and math.isinf(
        pair.candidate
    ):  # exp has overflowed, its logarithm hasn't
        return interval.value, interval.ci95
    return _log(pair.candidate) - _log(pair.baseline), None if interval is None else interval.ci95


def _paired(now: Accuracy | None, then: Accuracy | None) -> tuple[float, float] | None:
    """The interval from samples that both sessions judged; None where they aren't the same."""
    if now is None or then is None or now.sample_losses is None or then.sample_losses is None:
        return None
    mine, other = now.sample_losses, then.sample_losses
    if now.text_sha256 != then.text_sha256 or mine.tokens != other.tokens:
        return None
    increases = [np.subtract(one.candidate, one.baseline) for one in (mine, other)]
    interval = mean_interval(increases[0] - increases[1], np.array(mine.tokens, dtype=np.float64))
    return None if interval is None else interval.ci95


def _same_question(report: ComparisonReport, baseline: ComparisonReport) -> bool:
    """The same candidate file on the same text."""
    mine, other = report.accuracy, baseline.accuracy
    assert mine is not None
    assert other is not None
    return (report.arms.candidate.sha256, mine.text_sha256, mine.tokens) == (
        baseline.arms.candidate.sha256,
        other.text_sha256,
        other.tokens,
    )


def _scores(report: ComparisonReport, baseline: ComparisonReport | None) -> list[CheckedValue]:
    now = _by_name(report)
    if baseline is None:
        return [_score(score, None) for score in now.values()]
    then = _by_name(baseline)
    return [_score(now[name], then[name]) for name in then if name in now]


def _by_name(report: ComparisonReport) -> dict[str, TaskResult]:
    task_results: dict[str, TaskResult] = {}
    for score in [] if report.accuracy is None else report.accuracy.tasks:
        name = f"{score.task}, {score.metric}"
        if name in task_results:
            raise RegressionError(f"$.accuracy.tasks has {name} twice.", code="named-twice")
        task_results[name] = score
    return task_results


def _score(now: TaskResult, then: TaskResult | None) -> CheckedValue:
    value, interval = now.difference.value, now.difference.ci95
    if then is not None:
        old = then.difference
        value, interval = (
            value - old.value,
            difference_interval(value, interval, old.value, old.ci95),
        )
        if now.difference == old and now.items == then.items:
            interval = (0.0, 0.0)
    return CheckedValue(
        "task",
        f"{now.task}, {now.metric}",
        "",
        before=now.baseline if then is None else then.candidate,
        after=now.candidate,
        value=value,
        ci95=interval,
        scale="difference",
        higher_is_better=now.higher_is_better,
        unchanged=0.0,
    )


def _log(value: float) -> float:
    return math.log(value) if math.isfinite(value) else math.inf


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
