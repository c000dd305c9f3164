"""A decoder on ONNX Runtime; the cache stays where the model runs."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from exporter.engines.decoding.cache_names import LOGITS, runner_caches
from exporter.engines.decoding.caches import IDS, MASK, POSITIONS, Cache, open_cache
from exporter.engines.runners.base import Capabilities, TensorSpec
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.prefill_chunks import chunks
from exporter.errors import BackendError

_NOT_LOADED = "The decoder of {} is used outside its with block."


class OnnxRuntimeDecoder:
    """See :class:`exporter.engines.decoding.decoder.Decoder`.

    Args:
        model: An ONNX file with a KV cache, its names as optimum has them.
        provider: ``cpu`` or ``cuda``.
        threads: CPU threads.
        context: Positions that a text may have at most, and that a cache in one buffer has room
            for; None takes what each text needs.
    """

    backend = "onnxruntime"

    def __init__(
        self, model: Path, *, provider: str = "cpu", threads: int, context: int | None = None
    ) -> None:
        self._runner = OnnxRuntimeRunner(model, provider=provider, threads=threads)
        self._lent = False
        self._context = context
        self._specs: dict[str, TensorSpec] = {}
        self._pasts: frozenset[str] = frozenset()
        self._cache: Cache | None = None
        self._length = 0

    @classmethod
    def on(cls, runner: OnnxRuntimeRunner) -> Self:
        """A decoder on an entered runner, which stays entered."""
        found = cls(runner.model, threads=runner.threads)
        found._runner, found._lent = runner, True
        return found

    @property
    def capabilities(self) -> Capabilities:
        """Those of its runner."""
        return self._runner.capabilities

    def __enter__(self) -> Self:
        """Loads the model.

        Raises:
            BackendError: It can't be loaded, or is no decoder with a cache.
        """
        if not self._lent:
            self._runner.__enter__()
        try:
            self._open()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Frees the model and its cache."""
        if self._cache is not None:
            self._cache.free()
        self._cache = None
        if not self._lent:
            self._runner.__exit__()

    @property
    def cache(self) -> Cache:
        """The cache, once loaded.

        Raises:
            BackendError: The decoder is not loaded.
        """
        if self._cache is None:
            raise BackendError(_NOT_LOADED.format(self._runner.model))
        return self._cache

    def refuse_unfit(self, batch: int, prompt: int, new_tokens: int) -> None:
        """Refuses what is longer than the context or the graph's tables; see the protocol."""
        limits = [self._context, self._runner.cache_form.longest]
        longest = min((each for each in limits if each is not None), default=None)
        needed = prompt + new_tokens - 1
        if longest is not None and needed > longest:
            raise BackendError(
                f"{self._runner.model} has room for {longest} positions; a prompt of {prompt} and "
                f"{new_tokens} new tokens take {needed}.",
                "Take a shorter prompt, fewer new tokens, or a longer context.",
            )

    def prefill(self, token_ids: NDArray[np.int64], *, context: int | None = None) -> NDArray[Any]:
        """Empties the cache and runs a prompt, a long one in chunks; see the protocol."""
        batch, prompt = token_ids.shape
        self._length = 0
        self.cache.begin(batch, self._context or context or prompt)
        least = self.capabilities.prefill_chunk_tokens if batch == 1 else 0
        *first, last = chunks(prompt, least)
        for span in first:
            self._run(token_ids[:, span])
        return self._run(token_ids[:, last])

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        """Runs one more token of each sequence; see the protocol."""
        return self._run(token_ids)

    def _open(self) -> None:
        runner = self._runner
        self._specs = {spec.name: spec for spec in runner.inputs}
        pairs = runner_caches(runner)
        if not pairs or LOGITS not in {spec.name for spec in runner.outputs}:
            raise BackendError(
                f"{runner.model} is no decoder with a KV cache: it can't generate.",
                "Export it with past_key_values, as depthcut export does.",
            )
        self._pasts = frozenset(pairs)
        self._cache = open_cache(runner, pairs)

    def _run(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        total = self._length + token_ids.shape[1]
        logits = self.cache.run(self._tokens(token_ids, total), total)
        self._length = total
        last: NDArray[Any] = logits.numpy()[:, -1].astype(np.float32)
        return last

    def _tokens(self, token_ids: NDArray[np.int64], total: int) -> dict[str, Any]:
        batch = len(token_ids)
        known = {
            IDS: token_ids,
            MASK: self._runner.cache_form.masked(np.ones((batch, total))),
            POSITIONS: np.tile(np.arange(self._length, total), (batch, 1)),
        }
        unknown = [n for n in self._specs if n not in known and n not in self._pasts]
        if unknown:
            raise BackendError(
                f"{self._runner.model} has an input {unknown[0]!r} of unknown meaning."
            )
        given = {
            name: np.ascontiguousarray(array, self._specs[name].dtype)
            for name, array in known.items()
            if name in self._specs
        }
        return {
            name: self._runner.value(array)
            for name, array in {**given, **self._runner.last_logits}.items()
        }
