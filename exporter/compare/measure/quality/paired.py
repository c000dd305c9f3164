"""Intervals and tests for two arms that were judged on the same samples or items."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import Interval
from exporter.compare.measure.bootstrap import expanded_level

Floats = NDArray[np.float64]
_LEVEL = 0.95
_RESAMPLES = 9999


def mean_interval(sums: Floats, counts: Floats) -> Interval | None:
    """The mean over all tokens, with the 95 % interval that the samples give it.

    Samples, not tokens, are what was drawn at random: tokens of one sample resemble each other. A
    sample's own figure is the mean of hundreds of tokens, so Student's t holds for the few samples
    of an evaluation, where a bootstrap's percentiles would be too narrow. Samples of unlike length
    weigh by their tokens (the ratio estimator's linearised variance, Cochran, *Sampling
    Techniques*, 1977, section 6.3).

    Args:
        sums: ``[samples]``, each sample's sum over its tokens; for a paired comparison, of the
            differences.
        counts: ``[samples]``, tokens.

    Returns:
        None with fewer than two samples, or where a sum isn't finite.
    """
    from scipy import stats

    number = int((counts > 0).sum())
    if number < 2 or not np.isfinite(sums).all():
        return None
    mean = float(sums.sum() / counts.sum())
    residuals = sums - mean * counts
    error = math.sqrt(float((residuals**2).sum()) * number / (number - 1)) / float(counts.sum())
    reach = error * float(stats.t.ppf((1 + _LEVEL) / 2, number - 1))
    return Interval(value=mean, ci95=(mean - reach, mean + reach))


def difference_interval(baseline: Floats, candidate: Floats, *, seed: int = 0) -> Interval:
    """Mean score of the candidate minus that of the baseline, with its 95 % interval.

    From a bootstrap over items: both arms' scores of an item are drawn together (expanded
    percentiles). Where all items differ alike, or none does, there is nothing to draw from: the
    interval then reaches as far as the share of items that are otherwise may go unseen (Clopper
    and Pearson, 1934), at worst with the whole of a score.

    Args:
        baseline: ``[items]``, scores, usually from 0 to 1.
        candidate: ``[items]``, of the same items.
        seed: For the resampling.
    """
    from scipy import stats

    differences = candidate - baseline
    number = len(differences)
    value = float(differences.mean())
    if (differences == differences[0]).all():
        unseen = 1 - ((1 - _LEVEL) / 2) ** (1 / number)
        most = max(1.0, abs(value))  # lm-eval has metrics beyond 0 to 1
        low, high = (value * (1 - unseen) + side * unseen * most for side in (-1, 1))
        return Interval(value=value, ci95=(low, high))
    found = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=max(1, 4_000_000 // number),
        confidence_level=expanded_level(number, _LEVEL),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value=value, ci95=(float(found.low), float(found.high)))


def mcnemar_p(only_baseline: int, only_candidate: int) -> float:
    """Exact two-sided McNemar test of two arms that are right equally often.

    Args:
        only_baseline: Items that only the baseline gets right.
        only_candidate: Items that only the candidate gets right.

    Returns:
        The probability of a split at least as uneven, if the arms were equal. 1 without such
        items.
    """
    from scipy import stats

    number = only_baseline + only_candidate
    return float(stats.binomtest(only_baseline, number, 0.5).pvalue) if number else 1.0
