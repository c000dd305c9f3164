"""What a backend offers for generation: a decoder that keeps its own KV cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from exporter.engines.runners.base import Capabilities, Runner
from exporter.errors import BackendError
from exporter.models.graph_facts import CACHE_INPUT

LOGITS, LOGITS_AXES = "logits", 3
IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
"""The inputs that follow from the tokens."""


class Decoder(ABC):
    """A decoder between ``__enter__`` and ``__exit__``. The cache stays where the model runs."""

    backend: str
    capabilities: Capabilities  # complete once it was entered

    @abstractmethod
    def __enter__(self) -> Self:
        """Loads the model."""

    @abstractmethod
    def __exit__(self, *exc_info: object) -> None:
        """Frees the model and its cache."""

    @abstractmethod
    def refuse_unfit(self, batch: int, prompt: int, new_tokens: int) -> None:
        """Refuses what the backend has no room for; the last new token is not run."""

    @abstractmethod
    def prefill(self, token_ids: NDArray[np.int64], *, context: int | None = None) -> NDArray[Any]:
        """Empties the cache and runs a prompt ``[batch, sequence]`` without padding.

        Gives the last position's logits ``[batch, vocabulary]``, float32. A cache that doesn't grow
        has room for ``context`` positions, or the prompt's.
        """

    @abstractmethod
    def step(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        """Runs one more token of each sequence, ``[batch, 1]``; gives its logits likewise."""


def cache_pairs(pasts: Iterable[str], outputs: Collection[str]) -> dict[str, str]:
    """By cache input, the output that is its next content, by the names that exporters give."""
    texts = {}
    for past in pasts:
        names = [past.replace("past_key_values", new, 1) for new in ("present", "cache")]
        names.append(past.replace("past", "present", 1))
        present = next((name for name in names if name in outputs), None)
        if present is None:
            raise BackendError(f"No output continues the cache {past!r}.", code="unknown-input")
        texts[past] = present
    return texts


def runner_caches(runner: Runner) -> dict[str, str]:
    """The same of an entered runner; empty where it has no cache."""
    pasts = [spec.name for spec in runner.inputs if CACHE_INPUT.fullmatch(spec.name)]
    return cache_pairs(pasts, [spec.name for spec in runner.outputs])


def no_decoder(name: str) -> BackendError:
    """The error for a model that keeps no cache, or has no logits."""
    return BackendError(
        f"{name} is no decoder with a KV cache: it can't generate.",
        "Export it with past_key_values, as depthcut export does.",
        code="no-kv-cache",
    )
