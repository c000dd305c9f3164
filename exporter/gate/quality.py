"""Accuracy: perplexity, divergence and agreement with the unpruned arm, and tasks.

Both sessions judge the same unpruned model on the same text, so what grew between them is the
candidate's loss above it, sample by sample where the reports have the samples' losses. The same
candidate file on the same text gives the same loss again: there is no interval to speak of then.
"""

from __future__ import annotations

import math

from exporter.artifacts import Accuracy, Check, ComparisonReport, TaskResult
from exporter.errors import RegressionError
from exporter.gate.intervals import difference
from exporter.gate.judge import Estimate, judge
from exporter.gate.limits import Limits

_MEASURE = "Leave the limit out, or measure it: depthcut compare on models with a tokenizer."


def accuracy_checks(
    report: ComparisonReport, baseline: ComparisonReport | None, limits: Limits
) -> list[Check]:
    """One check a limit that is set; one a task.

    Raises:
        RegressionError: A limit is set on what a report didn't measure.
    """
    checks = []
    if limits.max_perplexity_increase is not None:
        increase = _perplexity(report, baseline)
        checks.append(judge(increase, 1 + limits.max_perplexity_increase))
    if limits.max_kl is not None:
        checks.append(judge(_divergence(_accuracy(report, "max-kl")), limits.max_kl))
    if limits.min_top1_agreement is not None:
        agreement = _agreement(_accuracy(report, "min-top1-agreement"))
        checks.append(judge(agreement, limits.min_top1_agreement))
    if limits.min_embedding_cosine is not None:
        cosine = _cosine(_accuracy(report, "min-embedding-cosine"))
        checks.append(judge(cosine, limits.min_embedding_cosine))
    if limits.max_task_drop is not None:
        for estimate in _tasks(report, baseline):
            sign = -1 if estimate.higher_is_better else 1
            checks.append(judge(estimate, sign * limits.max_task_drop))
    return checks


def has_perplexity(report: ComparisonReport) -> bool:
    """Whether there is a perplexity to check."""
    return report.accuracy is not None and report.accuracy.perplexity is not None


def _accuracy(report: ComparisonReport, limit: str) -> Accuracy:
    if report.accuracy is None:
        raise RegressionError(f"{limit} is set, but a report has no accuracy.", _MEASURE)
    return report.accuracy


def _perplexity(report: ComparisonReport, baseline: ComparisonReport | None) -> Estimate:
    after = _candidate_perplexity(report)
    now, now_ci95 = _increase(report)
    if baseline is None:
        accuracy = _accuracy(report, "max-perplexity-increase")
        assert accuracy.perplexity is not None
        before, log_ratio, interval = accuracy.perplexity.baseline, now, now_ci95
    else:
        then, then_ci95 = _increase(baseline)
        before, log_ratio, interval = _candidate_perplexity(baseline), now - then, None
        if now_ci95 and then_ci95 and not _same_question(report, baseline):
            unpaired = difference(now, now_ci95, then, then_ci95)
            interval = _paired(report.accuracy, baseline.accuracy) or unpaired
    if math.isnan(log_ratio):  # both collapsed: infinite then and now
        log_ratio = 0.0
    return Estimate(
        "perplexity",
        "evaluation text",
        "",
        before=before,
        after=after,
        value=_exp(log_ratio),
        ci95=None if interval is None else (_exp(interval[0]), _exp(interval[1])),
        note="" if interval or baseline else "The report has no interval for it.",
    )


def _candidate_perplexity(report: ComparisonReport) -> float:
    accuracy = _accuracy(report, "max-perplexity-increase")
    if accuracy.perplexity is None:
        raise RegressionError(
            "max-perplexity-increase is set, but a report has no perplexity.", _MEASURE
        )
    return accuracy.perplexity.candidate


def _increase(report: ComparisonReport) -> tuple[float, tuple[float, float] | None]:
    """Logarithm of the candidate's perplexity over its unpruned arm's, and its interval."""
    accuracy = report.accuracy
    assert accuracy is not None
    assert accuracy.perplexity is not None
    pair, told = accuracy.perplexity, accuracy.log_perplexity_increase
    if not min(pair.baseline, pair.candidate) > 0:
        raise RegressionError("A perplexity is at least 1; $.accuracy.perplexity is not.")
    return _log(pair.candidate) - _log(pair.baseline), None if told is None else told.ci95


def _paired(now: Accuracy | None, then: Accuracy | None) -> tuple[float, float] | None:
    """The interval from samples that both sessions judged; None where they aren't the same."""
    if now is None or then is None or now.sample_losses is None or then.sample_losses is None:
        return None
    mine, other = now.sample_losses, then.sample_losses
    if now.text_sha256 != then.text_sha256 or mine.tokens != other.tokens:
        return None
    import numpy as np

    from exporter.compare.measure.quality.paired import mean_interval

    increases = [np.subtract(one.candidate, one.baseline) for one in (mine, other)]
    found = mean_interval(increases[0] - increases[1], np.array(mine.tokens, dtype=np.float64))
    return None if found is None else found.ci95


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


def _divergence(accuracy: Accuracy) -> Estimate:
    if accuracy.kl_divergence is None:
        raise RegressionError("max-kl is set, but a report has no KL divergence.", _MEASURE)
    interval = accuracy.kl_interval
    return Estimate(
        "kl_divergence",
        "from the unpruned arm",
        "nats",
        before=None,
        after=accuracy.kl_divergence,
        value=accuracy.kl_divergence,
        ci95=None if interval is None else interval.ci95,
        scale="difference",
        unchanged=0.0,
    )


def _agreement(accuracy: Accuracy) -> Estimate:
    if accuracy.top1_agreement is None:
        raise RegressionError("min-top1-agreement is set, but a report has none.", _MEASURE)
    return Estimate(
        "top1_agreement",
        "with the unpruned arm",
        "",
        before=None,
        after=accuracy.top1_agreement,
        value=accuracy.top1_agreement,
        scale="difference",
        higher_is_better=True,
        unchanged=1.0,
    )


def _cosine(accuracy: Accuracy) -> Estimate:
    if accuracy.embeddings is None:
        raise RegressionError("min-embedding-cosine is set, but a report has none.", _MEASURE)
    return Estimate(
        "embedding_cosine",
        "with the unpruned arm",
        "",
        before=None,
        after=accuracy.embeddings.cosine,
        value=accuracy.embeddings.cosine,
        scale="difference",
        higher_is_better=True,
        unchanged=1.0,
    )


def _tasks(report: ComparisonReport, baseline: ComparisonReport | None) -> list[Estimate]:
    now = _by_name(report)
    if baseline is None:
        return [_task(task, None) for task in now.values()]
    then = _by_name(baseline)
    if missing := [name for name in then if name not in now]:
        raise RegressionError(
            f"max-task-drop is set, but the report lacks what its baseline has: "
            f"{'; '.join(missing)}.",
            "Score the same tasks, or write a new baseline with --update-baseline.",
        )
    return [_task(now[name], then[name]) for name in then]


def _by_name(report: ComparisonReport) -> dict[str, TaskResult]:
    found: dict[str, TaskResult] = {}
    for task in _accuracy(report, "max-task-drop").tasks:
        name = f"{task.task}, {task.metric}"
        if name in found:
            raise RegressionError(f"$.accuracy.tasks has {name} twice.")
        found[name] = task
    if not found:
        raise RegressionError("max-task-drop is set, but a report has no task.", _MEASURE)
    return found


def _task(now: TaskResult, then: TaskResult | None) -> Estimate:
    value, interval = now.difference.value, now.difference.ci95
    if then is not None:
        old = then.difference
        value, interval = value - old.value, difference(value, interval, old.value, old.ci95)
        if now.difference == old and now.items == then.items:
            interval = (0.0, 0.0)
    return Estimate(
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
