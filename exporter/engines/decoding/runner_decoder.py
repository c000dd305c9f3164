"""A decoder on any entered runner; its cache passes through the host's memory."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from exporter.engines.decoding.cache_names import LOGITS, runner_caches
from exporter.engines.inputs import Shape, make_inputs
from exporter.engines.runners.base import Array, Runner
from exporter.errors import BackendError


class RunnerDecoder:
    """See :class:`exporter.engines.decoding.decoder.Decoder`.

    For judging answers, where the model is loaded already and a second copy of its weights would
    cost more than the copies of the cache.

    Args:
        runner: An entered runner of a decoder with a KV cache; it stays entered.
    """

    def __init__(self, runner: Runner) -> None:
        self.backend = runner.backend
        self.capabilities = runner.capabilities
        self._runner = runner
        self._successors: dict[str, str] = {}
        self._cache: dict[str, Array] = {}
        self._length = 0

    def __enter__(self) -> Self:
        """Makes sure that the model can generate.

        Raises:
            BackendError: It is no decoder with a cache.
        """
        self._successors = runner_caches(self._runner)
        if not self._successors or LOGITS not in {spec.name for spec in self._runner.outputs}:
            raise BackendError(
                "A model without a KV cache can't generate.",
                "Export it with past_key_values, as depthcut export does.",
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Frees the cache."""
        self._cache = {}

    def refuse_unfit(self, batch: int, prompt: int, new_tokens: int) -> None:
        """Refuses what a bounded runner doesn't hold; see the protocol."""
        runner = self._runner
        runs = [Shape("prefill", batch, prompt)]
        if new_tokens > 1:  # the first step has the shortest cache, the last the longest
            runs += [Shape("decode", batch, 1, past) for past in (prompt, prompt + new_tokens - 2)]
        for shape in runs:
            tokens = np.zeros((batch, shape.sequence_length), np.int64)
            inputs = make_inputs(runner.inputs, shape, tokens)
            runner.refuse_shapes({name: array.shape for name, array in inputs.items()})

    def prefill(self, token_ids: NDArray[np.int64], *, context: int | None = None) -> NDArray[Any]:
        """Empties the cache and runs a prompt; see the protocol."""
        self._cache, self._length = {}, 0
        return self._run(token_ids)

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        """Runs one more token of each sequence; see the protocol."""
        return self._run(token_ids)

    def _run(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        batch, new = token_ids.shape
        shape = Shape("decode" if self._length else "prefill", batch, new, self._length)
        inputs = make_inputs(self._runner.inputs, shape, token_ids, cache=self._cache)
        found = self._runner.run(inputs, [LOGITS, *self._successors.values()])
        self._cache = {past: found[name] for past, name in self._successors.items()}
        self._length += new
        last: NDArray[Any] = found[LOGITS][:, -1].astype(np.float32)
        return last
