"""A decoder on a runner; the cache stays where the model runs, where the runner can keep it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from exporter.engines.decoding.caches import Cache, cache_shape, open_cache
from exporter.engines.decoding.decoder import (
    IDS,
    LOGITS,
    MASK,
    POSITIONS,
    Decoder,
    no_decoder,
    runner_caches,
)
from exporter.engines.runners.base import Array, Capabilities, Runner
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.prefill_chunks import chunks
from exporter.engines.tensors import TensorSpec
from exporter.errors import BackendError

_TYPES = "token_type_ids"


class RunnerDecoder(Decoder):
    """A decoder on an entered runner, which stays entered.

    Args:
        runner: Of a model with a KV cache, its names as optimum has them.
        context: Positions that a text may have at most, and that a cache in one buffer has room
            for; None takes what each text needs.
    """

    def __init__(self, runner: Runner, *, context: int | None = None) -> None:
        self.backend = runner.backend
        self._runner = runner
        self._context = context
        self._specs: dict[str, TensorSpec] = {}
        self._cache: Cache | None = None
        self._length = 0

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        """Those of its runner."""
        return self._runner.capabilities

    def __enter__(self) -> Self:
        """Makes sure that the model can generate."""
        runner = self._runner
        self._specs = {spec.name: spec for spec in runner.inputs}
        pairs = runner_caches(runner)
        if not pairs or LOGITS not in {spec.name for spec in runner.outputs}:
            raise no_decoder(runner.name)
        known = {IDS, MASK, POSITIONS, _TYPES, *pairs}
        unknown = next((name for name in self._specs if name not in known), None)
        if unknown is not None:
            raise BackendError(f"{runner.name} has an input {unknown!r} of unknown meaning.")
        self._cache = open_cache(runner, pairs)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Frees the cache."""
        if self._cache is not None:
            self._cache.free()
        self._cache = None

    @property
    def cache(self) -> Cache:
        """The cache, once entered.

        Raises:
            BackendError: The decoder is not entered.
        """
        if self._cache is None:
            raise BackendError(f"{self._runner.name}: a decoder is used outside its with block.")
        return self._cache

    def refuse_unfit(self, batch: int, prompt: int, new_tokens: int) -> None:
        """Refuses what is longer than the context or the graph's tables, or no profile holds."""
        self._refuse_too_long(prompt, new_tokens)
        self._refuse_shapes(batch, prompt, 0)
        if new_tokens > 1:  # the first step has the shortest cache, the last the longest
            for past in (prompt, prompt + new_tokens - 2):
                self._refuse_shapes(batch, 1, past)

    def prefill(self, token_ids: NDArray[np.int64], *, context: int | None = None) -> NDArray[Any]:
        """Empties the cache and runs a prompt, a long one in chunks."""
        batch, prompt = token_ids.shape
        self._length = 0
        self.cache.begin(batch, self._context or context or prompt)
        least = self.capabilities.prefill_chunk_tokens if batch == 1 else 0
        *first, last = chunks(prompt, least)
        for span in first:
            self._run(token_ids[:, span])
        return self._run(token_ids[:, last])

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        """Runs one more token of each sequence."""
        return self._run(token_ids)

    def _refuse_too_long(self, prompt: int, new_tokens: int) -> None:
        runner = self._runner
        told = runner.cache_form.longest if isinstance(runner, OnnxRuntimeRunner) else None
        longest = min((each for each in (self._context, told) if each is not None), default=None)
        needed = prompt + new_tokens - 1
        if longest is not None and needed > longest:
            raise BackendError(
                f"{runner.name} has room for {longest} positions; a prompt of {prompt} and "
                f"{new_tokens} new tokens take {needed}.",
                "Take a shorter prompt, fewer new tokens, or a longer context.",
                code="cache-too-short",
            )

    def _refuse_shapes(self, batch: int, sequence: int, past: int) -> None:
        tokens = (batch, sequence)
        known = {IDS: tokens, MASK: (batch, past + sequence), POSITIONS: tokens, _TYPES: tokens}
        shapes = {
            spec.name: known.get(spec.name) or cache_shape(spec, batch, past)
            for spec in self._runner.inputs
        }
        self._runner.refuse_shapes(shapes, phase="decode" if past else "prefill")

    def _run(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        total = self._length + token_ids.shape[1]
        logits = self.cache.run(self._tokens(token_ids, total), total)
        self._length = total
        last: NDArray[Any] = logits[:, -1].astype(np.float32)
        return last

    def _tokens(self, token_ids: NDArray[np.int64], total: int) -> dict[str, Array]:
        batch = len(token_ids)
        known = {
            IDS: token_ids,
            MASK: np.ones((batch, total)),
            POSITIONS: np.tile(np.arange(self._length, total), (batch, 1)),
            _TYPES: np.zeros_like(token_ids),
        }
        return {
            name: np.ascontiguousarray(array, self._specs[name].dtype)
            for name, array in known.items()
            if name in self._specs
        }


class LoadingDecoder(RunnerDecoder):
    """The same on a runner that it enters and leaves itself."""

    def __enter__(self) -> Self:
        """Loads the model."""
        self._runner.__enter__()
        try:
            return super().__enter__()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exc_info: object) -> None:
        """Frees the model and its cache."""
        super().__exit__()
        self._runner.__exit__()

    def refuse_unfit(self, batch: int, prompt: int, new_tokens: int) -> None:
        """Refuses what is longer than the context or the graph's tables; it need not be loaded."""
        self._refuse_too_long(prompt, new_tokens)


class OnnxRuntimeDecoder(LoadingDecoder):
    """The same of an ONNX file on ONNX Runtime."""

    def __init__(
        self, model: Path, *, provider: str = "cpu", threads: int, context: int | None = None
    ) -> None:
        runner = OnnxRuntimeRunner(model, provider=provider, threads=threads)
        super().__init__(runner, context=context)
