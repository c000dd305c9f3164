"""What a backend offers for generation: a decoder that keeps its own KV cache."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from exporter.engines.runners.base import Capabilities


class Decoder(Protocol):
    """A decoder between ``__enter__`` and ``__exit__``. The cache stays where the model runs.

    Attributes:
        backend: What runs it, such as ``onnxruntime`` or ``tensorrt-rtx``.
    """

    backend: str

    @property
    def capabilities(self) -> Capabilities:
        """What it can do and what it takes; complete once it was entered."""

    def __enter__(self) -> Self:
        """Loads the model.

        Raises:
            BackendError: It can't be loaded, or is no decoder with a cache.
        """

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Frees the model and its cache."""

    def refuse_unfit(self, batch: int, prompt: int, new_tokens: int) -> None:
        """Refuses what the backend has no room for, before anything runs.

        Args:
            batch: Sequences.
            prompt: Tokens of each prompt.
            new_tokens: The most tokens to generate; the last of them is not run.

        Raises:
            BackendError: It says what is asked for and what there is room for.
        """

    def prefill(self, token_ids: NDArray[np.int64], *, context: int | None = None) -> NDArray[Any]:
        """Empties the cache and runs a prompt.

        Args:
            token_ids: ``[batch, sequence]``, no padding.
            context: Positions that the text will reach, for a cache that doesn't grow; None for
                the prompt alone, unless the decoder was made for more.

        Returns:
            The logits of the last position, ``[batch, vocabulary]``, float32.
        """

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        """Runs one more token of each sequence.

        Args:
            token_ids: ``[batch, 1]``.

        Returns:
            Its logits, ``[batch, vocabulary]``, float32.
        """
