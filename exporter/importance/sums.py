"""Means over samples of unequal length with their standard errors, from sums that don't grow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class RatioSums:
    """Running sums for ``sum of values / sum of weights`` over samples, of many things at once.

    The standard error is that of a ratio of two sums over samples, so that samples of unequal
    length count by their tokens.

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
        self._samples += len(weights)

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
        """``shape``; None with fewer than two samples."""
        if self._samples < 2:
            return None
        means, factor = self.means, self._samples / (self._samples - 1)
        squares = self._dd - 2 * means * self._dn + means * means * self._nn
        errors: Floats = np.sqrt(np.maximum(0.0, squares) * factor) / self._n
        return errors
