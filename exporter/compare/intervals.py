"""Intervals and tests for two arms that were judged on the same samples or items."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from exporter.artifacts import Interval
from exporter.models.ablation.damage import (
    Clusters,
    Floats,
    by_cluster,
    degrees_of_freedom,
    ratio,
    ratio_std_error,
)

MOST_JUDGED = 1024
"""Texts, or pairs, that judge a classifier: a limit near to 1 takes more than are waited for."""
_LEVEL = 0.95
_RESAMPLES = 9999
_STRAIGHT = 1e-6  # a skewness below it is none


def expanded_level(units: int, confidence: float = 0.95) -> float:
    """The nominal level at which a percentile interval is as wide as Student's t interval.

    Resampling so many units varies too little, and the more so the fewer they are: Hesterberg,
    "What Teachers Should Know about the Bootstrap", 2014, arXiv 1411.5279, expanded percentile
    interval.
    """
    quantile = stats.t.ppf((1 + confidence) / 2, units - 1) * math.sqrt(units / (units - 1))
    return float(1 - 2 * stats.norm.sf(quantile))


def mean_interval(
    sums: Floats,  # `[samples]`, each sample's sum over its tokens
    counts: Floats,  # `[samples]`, tokens
    clusters: Clusters = None,
    *,
    positive: bool = False,
    looks: int = 1,
) -> Interval | None:
    """The mean over all tokens, with the 95 % interval that the samples give it.

    Samples, or the documents that they are of, are what was drawn at random, not tokens: tokens of
    one sample resemble each other. The interval is Student's t, corrected for the mean's skewness
    by Hall's transformation ("On the removal of skewness by transformation", J. R. Statist. Soc. B
    54, 1992); the t interval counts where it reaches further.
    """
    sums, counts = by_cluster(sums, clusters), by_cluster(counts, clusters)
    error = ratio_std_error(sums, counts) if np.isfinite(sums).all() else None
    if error is None:
        return None
    mean = ratio(sums, counts)
    reach = float(stats.t.ppf(1 - (1 - _LEVEL) / 2 / looks, degrees_of_freedom(counts)))
    skewness = _skewness(sums - mean * counts)
    if positive and mean > 0:
        skewness = max(skewness, 2 * error / mean)
    ends = [mean - error * _unskewed(side * reach, skewness) for side in (1, -1)]
    if not positive:
        ends = [min(ends[0], mean - reach * error), max(ends[1], mean + reach * error)]
    return Interval(value=mean, ci95=(ends[0], ends[1]))


def _skewness(residuals: Floats) -> float:
    """Of a mean, from its clusters' residuals."""
    squares = float((residuals**2).sum())
    return float((residuals**3).sum()) / squares**1.5 if squares > 0 else 0.0


def _unskewed(quantile: float, skewness: float) -> float:
    """The studentised mean that Hall's transformation turns into a symmetrical quantile."""
    if abs(skewness) < _STRAIGHT:
        return quantile
    return float(3 / skewness * (np.cbrt(1 + skewness * (quantile - skewness / 6)) - 1))


def clipped(interval: Interval | None, low: float, high: float) -> Interval | None:
    """Cuts off of an interval what its value can't be."""
    if interval is None:
        return None
    value, (below, above) = interval.value, interval.ci95
    return Interval(value=value, ci95=(min(value, max(below, low)), max(value, min(above, high))))


def share_interval(sums: Floats, counts: Floats, clusters: Clusters = None) -> Interval | None:
    """The share of all tokens that something holds for, with its 95 % interval over samples.

    Korn and Graubard, "Confidence intervals for proportions with small expected number of positive
    counts estimated from survey data" (Survey Methodology 24, 1998): Clopper and Pearson's, of as
    many independent tokens as would vary like these samples. It stays within 0 to 1, and where all
    tokens agree it is as wide as so many tokens allow.

    sums: `[samples]`, of how many of a sample's tokens it holds.
    counts: `[samples]`, tokens.
    """
    sums, counts = by_cluster(sums, clusters), by_cluster(counts, clusters)
    error = ratio_std_error(sums, counts)
    if error is None:
        return None
    share, tokens = ratio(sums, counts), float(counts.sum())
    quantile = (1 + _LEVEL) / 2
    wider = (stats.norm.ppf(quantile) / stats.t.ppf(quantile, degrees_of_freedom(counts))) ** 2
    if error > 0:
        tokens = min(tokens, wider * share * (1 - share) / error**2)
    held = share * tokens
    low = stats.beta.ppf(1 - quantile, held, tokens - held + 1) if held > 0 else 0.0
    high = stats.beta.ppf(quantile, held + 1, tokens - held) if held < tokens else 1.0
    return Interval(value=share, ci95=(float(low), float(high)))


def fewest_to_show(share: float) -> int:
    """How many items, all of them alike, have a :func:`share_interval` that begins at a share."""
    return math.ceil(math.log((1 - _LEVEL) / 2) / math.log(share))


def highest_to_show(items: int) -> float:
    """The share at which the :func:`share_interval` of so many items begins, all of them alike."""
    return float(((1 - _LEVEL) / 2) ** (1 / items))


def difference_interval(
    baseline: Floats,  # `[items]`, scores, usually from 0 to 1; with weights, sums, such as edits
    candidate: Floats,  # `[items]`, of the same items
    weights: Floats | None = None,  # `[items]`, what the sums go over, such as words; None: 1 each
    *,
    clusters: Clusters = None,
    seed: int = 0,
) -> Interval:
    """Mean score of the candidate minus that of the baseline, with its 95 % interval.

    From a bootstrap over items: both arms' scores of an item, and its weight, are drawn together
    (expanded percentiles). Where all items differ alike, or none does, there is nothing to draw
    from: the interval then reaches as far as the share of items that are otherwise may go unseen
    (Clopper and Pearson, 1934), at worst with the whole of a score.
    """
    weights = np.ones_like(baseline) if weights is None else weights
    differences = by_cluster(candidate - baseline, clusters)
    weights = by_cluster(weights, clusters)
    value, number = ratio(differences, weights), len(differences)
    if np.allclose(differences, value * weights):
        return _of_equal_items(value, number)
    rng, ratios = np.random.default_rng(seed), np.empty(_RESAMPLES)
    for draw in range(_RESAMPLES):
        rows = rng.integers(0, number, number)
        total = weights[rows].sum()
        ratios[draw] = differences[rows].sum() / total if total else value
    outside = (1 - expanded_level(number, _LEVEL)) / 2
    low, high = np.quantile(ratios, [outside, 1 - outside])
    return Interval(value=value, ci95=(float(low), float(high)))


def _of_equal_items(value: float, number: int) -> Interval:
    """As wide as the share of items that differ otherwise may go unseen, at worst by a whole 1."""
    unseen = 1 - highest_to_show(number)
    most = max(1.0, abs(value))  # lm-eval has metrics beyond 0 to 1
    low, high = (value * (1 - unseen) + side * unseen * most for side in (-1, 1))
    return Interval(value=value, ci95=(low, high))
