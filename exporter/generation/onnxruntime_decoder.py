"""A decoder on ONNX Runtime; what one step gives for the cache is bound as the next one's input."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from exporter.backends.base import TensorSpec
from exporter.backends.onnxruntime import OnnxRuntimeRunner
from exporter.errors import BackendError
from exporter.generation.cache_names import LOGITS, cache_pairs
from exporter.measure.graph_facts import CACHE_INPUT


class OnnxRuntimeDecoder:
    """See :class:`exporter.generation.decoder.Decoder`.

    Args:
        model: An ONNX file with a KV cache, its names as optimum has them.
        provider: ``cpu`` or ``cuda``.
        threads: CPU threads.
    """

    backend = "onnxruntime"

    def __init__(self, model: Path, *, provider: str = "cpu", threads: int) -> None:
        self._model = model
        self._runner = OnnxRuntimeRunner(model, provider=provider, threads=threads)
        self._device = provider
        self._specs: dict[str, TensorSpec] = {}
        self._presents: dict[str, str] = {}
        self._cache: dict[str, Any] = {}
        self._length = 0

    @property
    def widened(self) -> bool:
        """Whether it runs a bfloat16 graph in float32; see the runner."""
        return self._runner.widened

    def __enter__(self) -> Self:
        """Loads the model.

        Raises:
            BackendError: It can't be loaded, or is no decoder with a cache.
        """
        self._runner.__enter__()
        try:
            self._specs = {spec.name: spec for spec in self._runner.inputs}
            outputs = {spec.name for spec in self._runner.outputs}
            self._presents = cache_pairs(
                [n for n in self._specs if CACHE_INPUT.fullmatch(n)], outputs
            )
            if not self._presents or LOGITS not in outputs:
                raise BackendError(
                    f"{self._model} is no decoder with a KV cache: it can't generate.",
                    "Export it with past_key_values, as depthcut export does.",
                )
        except BaseException:
            self._runner.__exit__()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Frees the model and its cache."""
        self._cache.clear()
        self._runner.__exit__()

    def refuse_unfit(self, batch: int, prompt: int, new_tokens: int) -> None:
        """Refuses nothing: the session takes every length; see the protocol."""

    def prefill(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        """Empties the cache and runs a prompt; see the protocol."""
        self._length = 0
        self._cache = {name: self._empty(name, len(token_ids)) for name in self._presents}
        return self._run(token_ids)

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        """Runs one more token of each sequence; see the protocol."""
        return self._run(token_ids)

    def _run(self, token_ids: NDArray[np.int64]) -> NDArray[Any]:
        total = self._length + token_ids.shape[1]
        inputs = {**self._tokens(token_ids, total), **self._cache}
        logits, *presents = self._runner.run_bound(inputs, [LOGITS, *self._presents.values()])
        self._cache = dict(zip(self._presents, presents, strict=True))
        self._length = total
        last: NDArray[Any] = logits.numpy()[:, -1].astype(np.float32)
        return last

    def _tokens(self, token_ids: NDArray[np.int64], total: int) -> dict[str, Any]:
        batch = len(token_ids)
        positions = np.tile(np.arange(self._length, total), (batch, 1))
        known = {
            "input_ids": token_ids,
            "attention_mask": np.ones((batch, total)),
            "position_ids": positions,
        }
        unknown = [n for n in self._specs if n not in known and n not in self._presents]
        if unknown:
            raise BackendError(f"{self._model} has an input {unknown[0]!r} of unknown meaning.")
        return {
            name: self._runner.value(np.ascontiguousarray(array, self._specs[name].dtype))
            for name, array in known.items()
            if name in self._specs
        }

    def _empty(self, name: str, batch: int) -> Any:
        spec = self._specs[name]
        heads, head_size = spec.shape[1], spec.shape[3]
        if not isinstance(heads, int) or not isinstance(head_size, int):
            raise BackendError(
                f"{name} declares no number of heads or no head size.",
                "A graph of onnxruntime-genai runs there; depthcut export writes both numbers.",
            )
        return self._runner.value(np.zeros((batch, heads, 0, head_size), spec.dtype))
