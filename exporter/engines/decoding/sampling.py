"""Chooses the next token from logits: the likeliest, or a draw."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from exporter.errors import BackendError
from exporter.option_types import Count, Seed, Written
from exporter.options import Options, dataclass, option


@dataclass(frozen=True)
class SamplingSettings(Options):
    """How tokens are chosen."""

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False), Written("X")] = option(
        0.0, "0 always takes the likeliest token; larger values flatten the distribution."
    )
    top_k: Count | None = option(
        None, "Sample from this many likeliest tokens.", usual="all", config_only=True
    )
    top_p: Annotated[float, Field(gt=0, le=1), Written("P")] = option(
        1.0,
        "Sample from the likeliest tokens with this total probability.",
        config_only=True,
    )
    seed: Seed = option(0, "Seed for sampling.")


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
            raise BackendError(
                "The model gives NaN logits, so there is no next token.", code="not-finite"
            )
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
