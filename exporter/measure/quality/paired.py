"""Intervals and tests for two arms that were judged on the same samples or items."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import Interval

Floats = NDArray[np.float64]
_LEVEL = 0.95


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
