"""Chooses the next token from logits: the likeliest, or a draw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import BackendError, UsageError


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token; larger ones flatten the distribution.
        top_k: Draws among that many likeliest tokens; None for all.
        top_p: Draws among the likeliest tokens that have this probability together.
        seed: The same seed gives the same draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"The temperature is {self.temperature}; it must be 0 or more.")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top-k is {self.top_k}; it must be 1 or more.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}; it must be above 0 and at most 1.")


class Sampler:
    """Draws one token after another."""

    def __init__(self, sampling: SamplingSettings) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: NDArray[Any]) -> NDArray[np.int64]:
        """The next tokens.

        Args:
            logits: ``[batch, vocabulary]``.

        Returns:
            Token ids, ``[batch]``.

        Raises:
            BackendError: The logits hold NaN.
        """
        if np.isnan(logits).any():
            raise BackendError("The model gives NaN logits, so there is no next token.")
        if self._sampling.temperature == 0:
            return np.asarray(logits.argmax(axis=-1), np.int64)
        return np.array([self._draw(row.astype(np.float64)) for row in logits], np.int64)

    def _draw(self, logits: NDArray[np.float64]) -> int:
        order = np.argsort(-logits, kind="stable")[: self._sampling.top_k]
        # The difference first: a tiny temperature then gives the likeliest token, not inf - inf.
        with np.errstate(over="ignore"):
            weights = np.exp((logits[order] - logits[order[0]]) / self._sampling.temperature)
        weights /= weights.sum()
        # The token with which the sum is reached is still in.
        kept = int(np.searchsorted(np.cumsum(weights), self._sampling.top_p)) + 1
        weights = weights[:kept] / weights[:kept].sum()
        return int(order[self._random.choice(len(weights), p=weights)])
