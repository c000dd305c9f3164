"""Ratios of two sums over samples, and their standard errors.

Tokens of one sample resemble each other, and so do samples of one document: these clusters, not
tokens, are what was drawn at random. Clusters of unequal length count by their tokens: the ratio
estimator's linearised variance (Cochran, *Sampling Techniques*, 1977, section 6.3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Clusters = NDArray[np.int64] | None
"""``[samples]``, of which document each is; None: each is one of its own."""


def by_cluster(values: Floats, clusters: Clusters) -> Floats:
    """Sums over each cluster's samples, ``[samples]`` to ``[clusters]``."""
    if clusters is None:
        return values
    sums: Floats = np.bincount(np.unique(clusters, return_inverse=True)[1], values).astype(float)
    return sums


def ratio(sums: Floats, counts: Floats) -> float:
    """``sum(sums) / sum(counts)``."""
    return float(sums.sum() / counts.sum())


def ratio_std_error(sums: Floats, counts: Floats, clusters: Clusters = None) -> float | None:
    """Standard error of :func:`ratio` over clusters; None with fewer than two that count."""
    sums, counts = by_cluster(sums, clusters), by_cluster(counts, clusters)
    if np.count_nonzero(counts) < 2:
        return None
    total = counts.sum()
    residuals = sums - ratio(sums, counts) * counts
    variance = (residuals**2).sum() / (1 - ((counts / total) ** 2).sum())
    return float(np.sqrt(variance) / total)


def degrees_of_freedom(counts: Floats) -> float:
    """Of :func:`ratio_std_error`: one less than the clusters if they are equal, else fewer.

    Satterthwaite's, as Bell and McCaffrey, "Bias reduction in standard errors for linear regression
    with multi-stage samples" (Survey Methodology 28, 2002), have them for a mean.
    """
    shares = counts / counts.sum()
    second, third = (shares**2).sum(), (shares**3).sum()
    return float((1 - second) ** 2 / (second - 2 * third + second**2))


class RatioSums:
    """The same of many things at once, each sample a cluster, from sums that don't grow with them.

    Args:
        shape: How many things, in as many axes as wanted.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        # Per sample i, with d_i the sum of its tokens' values and n_i their number:
        self._d, self._dd, self._dn = (np.zeros(shape) for _ in range(3))
        self._n, self._nn, self._samples = 0.0, 0.0, 0

    def add(self, sums: Floats, weights: Floats) -> None:
        """Takes some samples.

        Args:
            sums: ``[*shape, samples]``, each sample's sum.
            weights: ``[samples]``, over how many tokens.
        """
        self._d += sums.sum(axis=-1)
        self._dd += (sums * sums).sum(axis=-1)
        self._dn += (sums * weights).sum(axis=-1)
        self._n += float(weights.sum())
        self._nn += float((weights * weights).sum())
        self._samples += int(np.count_nonzero(weights))

    @property
    def total_weight(self) -> float:
        """Over how many tokens the means go."""
        return self._n

    @property
    def means(self) -> Floats:
        """``shape``; NaN before any token was there."""
        with np.errstate(invalid="ignore"):
            means: Floats = self._d / self._n if self._n else self._d * np.nan
        return means

    @property
    def std_errors(self) -> Floats | None:
        """``shape``; None with fewer than two samples that count."""
        if self._samples < 2:
            return None
        means, unequal = self.means, self._nn / self._n**2
        squares = self._dd - 2 * means * self._dn + means * means * self._nn
        errors: Floats = np.sqrt(np.maximum(0.0, squares) / (1 - unequal)) / self._n
        return errors
