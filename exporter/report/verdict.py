"""The whole comparison in one sentence, and in two words: how fast, how accurate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from exporter.artifacts import Accuracy, ComparisonReport, LatencyRow
from exporter.report.parts.corners import corners_sentence
from exporter.report.parts.part import Sign, verdict_sign
from exporter.report.words import (
    headline,
    relative_change,
    shape_words,
    significant,
    speedup_range,
)

_CLEAR = 0.01
"""A change of perplexity that has no interval counts as one from here on."""

_ALL = {
    "faster": "it is faster in {}, {} times as fast",
    "slower": "it is slower in {}, {} times as fast",
    "same": "it takes the same time in {}",
    "inconclusive": "whether it is faster can't be told from {}",
}
_SOME = {
    "faster": "faster in {}",
    "slower": "slower in {}",
    "same": "as fast in {}",
    "inconclusive": "without a verdict in {}",
}


def verdict_sentence(report: ComparisonReport) -> str:
    """What was done, what it does to the speed, and what it does to the answers."""
    told = f"{headline(report)}, {_speed(report)}; {_quality(report.accuracy)}."
    return " ".join(filter(None, [told, corners_sentence(report)]))


def speed_sign(report: ComparisonReport) -> Sign:
    """All rows' verdicts as one word; rows of both kinds are ``mixed``, not averaged."""
    words: set[str] = {row.verdict for row in report.latency}
    if not words:
        return Sign("speed not measured", "unsure")
    if len(words) == 1:
        return verdict_sign(words.pop())
    if {"faster", "slower"} <= words:
        return Sign("mixed speed", "unsure")
    return Sign("partly slower", "bad") if "slower" in words else _without_slower(words)


def _without_slower(words: set[str]) -> Sign:
    if "faster" in words:
        return Sign("partly faster", "good")
    return Sign("same or inconclusive", "unsure")


def quality_sign(report: ComparisonReport) -> Sign:
    """By perplexity and its interval; other figures have no side that is known to be worse."""
    accuracy = report.accuracy
    if accuracy is None:
        return Sign("accuracy not measured", "unsure")
    if accuracy.perplexity is None:
        return Sign("perplexity not measured", "unsure")
    low, high = _log_change(accuracy)
    if low > 0:
        return Sign("less accurate", "bad")
    if high < 0:
        return Sign("more accurate", "good")
    if low <= 0 <= high:
        return Sign("no clear loss of accuracy", "even")
    return Sign("accuracy is no number", "bad")


def _log_change(accuracy: Accuracy) -> tuple[float, float]:
    """The interval of the change of log perplexity; without one, a small change is none."""
    if accuracy.log_perplexity_increase is not None:
        return accuracy.log_perplexity_increase.ci95
    assert accuracy.perplexity is not None
    pair = accuracy.perplexity
    if not (pair.baseline > 0 and pair.candidate > 0):
        return math.nan, math.nan
    change = math.log(pair.candidate) - math.log(pair.baseline)
    return (0.0, 0.0) if abs(change) < _CLEAR else (change, change)


def _ratios(rows: Sequence[LatencyRow]) -> list[float]:
    return [row.speedup.ratio for row in rows]


def _speed(report: ComparisonReport) -> str:
    rows = report.latency
    if not rows:
        reasons = (report.arms.baseline.not_run, report.arms.candidate.not_run)
        why = next((reason for reason in reasons if reason), None)
        return "its speed was not measured" + (f" ({why.rstrip('.')})" if why else "")
    counts: Counter[str] = Counter(row.verdict for row in rows)
    if len(counts) == 1:
        where = (
            shape_words(rows[0])
            if len(rows) == 1
            else "both shapes"
            if len(rows) == 2
            else f"all {len(rows)} shapes"
        )
        return _ALL[rows[0].verdict].format(where, speedup_range(_ratios(rows)))
    told = [_SOME[word].format(counts[word]) for word in _SOME if counts[word]]
    return f"it is {', '.join(told[:-1])} and {told[-1]} of {len(rows)} shapes"


def _quality(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "its accuracy was not measured"
    if accuracy.perplexity is not None:
        pair = accuracy.perplexity
        change = relative_change(pair.baseline, pair.candidate)
        return (
            f"perplexity goes from {significant(pair.baseline)} to "
            f"{significant(pair.candidate)} ({change})"
        )
    if accuracy.embeddings is not None:
        return f"its embeddings keep a mean cosine of {accuracy.embeddings.cosine:.4f}"
    if accuracy.kl_divergence is not None:
        return (
            f"its predictions are {significant(accuracy.kl_divergence, 3)} nats of KL divergence "
            "from the baseline's"
        )
    return "its accuracy was not measured"
