"""Accuracy: perplexity, divergence and agreement with the unpruned arm, and tasks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from exporter.artifacts import Accuracy, Check, ComparisonReport, Interval, Quantity, TaskResult
from exporter.compare.intervals import mean_interval
from exporter.errors import RegressionError
from exporter.gate.limits import (
    FROM_ARM,
    WITH_ARM,
    CheckedValue,
    Limits,
    checked,
    difference_interval,
)

_NO_INTERVAL = "The report has no interval for it."

_Found = tuple[float | None, Interval | None]


def _cosine(accuracy: Accuracy) -> _Found:
    embeddings = accuracy.embeddings
    return (None, None) if embeddings is None else (embeddings.cosine, embeddings.cosine_interval)


def _ranking(accuracy: Accuracy) -> _Found:
    embeddings = accuracy.embeddings
    return (
        (None, None)
        if embeddings is None
        else (embeddings.rank_agreement, embeddings.rank_interval)
    )


_FROM_THE_UNPRUNED_ARM: dict[str, tuple[Quantity, Callable[[Accuracy], _Found]]] = {
    "max_kl": ("kl_divergence", lambda accuracy: (accuracy.kl_divergence, accuracy.kl_interval)),
    "min_top1_agreement": (
        "top1_agreement",
        lambda accuracy: (accuracy.top1_agreement, accuracy.top1_interval),
    ),
    "min_embedding_cosine": ("embedding_cosine", _cosine),
    "min_rank_agreement": ("rank_agreement", _ranking),
}
"""By limit, what a report says of the candidate and its own unpruned arm, and where."""


def accuracy_checks(
    report: ComparisonReport, baseline: ComparisonReport | None, limits: Limits
) -> list[Check]:
    """One check a limit that is set on what was measured; one a task."""
    checks = []
    if limits.max_perplexity_increase is not None and has_perplexity(report, baseline or report):
        increase = _perplexity(report, baseline)
        checks.append(checked(increase, 1 + limits.max_perplexity_increase))
    for name in _FROM_THE_UNPRUNED_ARM:
        limit, value = getattr(limits, name), _from_the_unpruned_arm(report.accuracy, name)
        if limit is not None and value is not None:
            checks.append(checked(value, limit))
    if (drop := limits.max_task_drop) is not None:
        for score in _scores(report, baseline):
            checks.append(checked(score, drop if not score.higher_is_better else -drop))
    return checks


def has_perplexity(*reports: ComparisonReport) -> bool:
    """Whether there is a perplexity in all of them."""
    return all(one.accuracy is not None and one.accuracy.perplexity is not None for one in reports)


def _from_the_unpruned_arm(accuracy: Accuracy | None, limit: str) -> CheckedValue | None:
    quantity, found_in = _FROM_THE_UNPRUNED_ARM[limit]
    value, interval = (None, None) if accuracy is None else found_in(accuracy)
    if value is None:
        return None
    higher = limit.startswith("min_")
    return CheckedValue(
        quantity,
        WITH_ARM if higher else FROM_ARM,
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
