"""A decoder on a runner; the cache stays where the model runs, where the runner can keep it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.latency import Phase
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
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner, chunks, host_array
from exporter.engines.tensors import TensorSpec
from exporter.errors import BackendError


class Cache(ABC):
    """The caches of one text after another, on an entered runner."""

    def __init__(self, runner: Runner, pairs: Mapping[str, str]) -> None:
        self._pairs = pairs
        self._specs = {spec.name: spec for spec in runner.inputs if spec.name in pairs}

    @abstractmethod
    def begin(self, batch: int, positions: int) -> None:
        """Empties them, for a text of so many positions at most."""

    @abstractmethod
    def run(self, tokens: Mapping[str, Array], total: int) -> Array:
        """Runs the model on new tokens and keeps their keys and values; ``total`` are filled then.

        Gives logits ``[batch, new or 1, vocabulary]``, which are good until the next run.
        """

    @abstractmethod
    def free(self) -> None:
        """Gives the memory back."""

    def _zeros(self, past: str, batch: int, length: int) -> Array:
        spec = self._specs[past]
        return np.zeros(cache_shape(spec, batch, length), spec.dtype)


def open_cache(runner: Runner, pairs: Mapping[str, str]) -> Cache:
    """The cache that runner and graph allow: in place where all of it can be."""
    if isinstance(runner, OnnxRuntimeRunner):
        in_place = runner.cache_form.shared
        if all(in_place.get(past) == present for past, present in pairs.items()):
            return SharedCache(runner, pairs)
    return GrowingCache(runner, pairs)


class GrowingCache(Cache):
    """What a step gives for the cache is the next one's input, where the runner keeps it.

    That is where the model runs, or else on the host: for judging answers, a second copy of the
    weights would cost more than copies of the cache.
    """

    def __init__(self, runner: Runner, pairs: Mapping[str, str]) -> None:
        super().__init__(runner, pairs)
        self._runner = runner
        self._values: dict[str, Any] = {}

    def begin(self, batch: int, positions: int) -> None:
        """Empties it."""
        self._values = {
            past: self._runner.value(self._zeros(past, batch, 0)) for past in self._pairs
        }

    def run(self, tokens: Mapping[str, Array], total: int) -> Array:
        """Runs the model."""
        phase: Phase = "prefill" if tokens[IDS].shape[1] == total else "decode"
        outputs = [LOGITS, *self._pairs.values()]
        logits, *presents = self._runner.continued(tokens, self._values, outputs, phase=phase)
        self._values = dict(zip(self._pairs, presents, strict=True))
        array: Array = logits
        return array

    def free(self) -> None:
        """Drops it."""
        self._values = {}


class SharedCache(Cache):
    """One buffer for each cache, with room for the whole text; nothing is copied between steps.

    The buffers and the bindings to them are made once, and kept as long as texts of the same size
    follow each other: what a former text has left lies beyond what the mask calls filled.
    """

    def __init__(self, runner: OnnxRuntimeRunner, pairs: Mapping[str, str]) -> None:
        super().__init__(runner, pairs)
        self._runner = runner
        self._size = (0, 0)
        self.buffers: dict[str, Any] = {}
        self._binding: Any = None
        self._tokens: Mapping[str, Any] = {}
        self._logits: Any = None

    def begin(self, batch: int, positions: int) -> None:
        """Makes room, where it isn't there already."""
        form = self._runner.cache_form
        size = (batch, form.buffer or positions)
        if size == self._size:
            return
        self.free()
        for past in self._pairs:
            room = form.length(past, positions)
            self.buffers[past] = self._runner.value(self._zeros(past, batch, room))
        self._size = size

    def run(self, tokens: Mapping[str, Array], total: int) -> Array:
        """Runs the model."""
        room = self._size[1]
        if total > room:
            raise BackendError(
                f"{self._runner.model}: the text reaches {total} positions; the cache has room for "
                f"{room}.",
                "Ask for a longer context.",
                code="cache-too-short",
            )
        given = self._runner.token_values(tokens)
        logits = self._answer(self._bound(), given) if tokens[IDS].shape[1] != 1 else None
        if logits is None and self._binding is None:
            self._binding = self._bound()
            self._logits = self._answer(self._binding, given)
            # Bound again as a value, it is the buffer of all later steps.
            self._binding.bind_ortvalue_output(LOGITS, self._logits)
        elif logits is None:
            self._feed(self._binding, given)
            self._runner.run_binding(self._binding)
        return host_array(self._logits if logits is None else logits)

    def free(self) -> None:
        """Drops the buffers."""
        self.buffers, self._size = {}, (0, 0)
        self._binding = self._logits = None
        self._tokens = {}

    def _answer(self, binding: Any, tokens: Mapping[str, Any]) -> Any:
        """Runs a binding whose logits have no buffer yet."""
        self._feed(binding, tokens)
        binding.bind_output(LOGITS, "cpu")  # of all outputs the one that the host reads
        self._runner.run_binding(binding)
        return binding.get_outputs()[-1]

    def _bound(self) -> Any:
        binding = self._runner.binding()
        for past, value in self.buffers.items():
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(self._pairs[past], value)
        return binding

    def _feed(self, binding: Any, tokens: Mapping[str, Any]) -> None:
        self._tokens = tokens  # the binding only borrows their memory
        for name, value in tokens.items():
            binding.bind_ortvalue_input(name, value)


def cache_shape(spec: TensorSpec, batch: int, length: int) -> tuple[int, int, int, int]:
    """The shape of a cache that holds so much."""
    heads, size = spec.shape[1], spec.shape[3]
    if not isinstance(heads, int) or not isinstance(size, int):
        raise BackendError(
            f"{spec.name} declares no number of heads or no head size, and the graph doesn't show "
            "them.",
            "Export the model with both; depthcut export writes them.",
            code="unknown-input",
        )
    return batch, heads, length, size


_TYPES = "token_type_ids"


class RunnerDecoder(Decoder):
    """A decoder on an entered runner, which stays entered; or on one that it loads itself."""

    def __init__(self, runner: Runner, *, context: int | None = None, loads: bool = False) -> None:
        self.backend = runner.backend
        self._runner = runner
        self._loads = loads
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
        with ExitStack() as stack:
            if self._loads:
                stack.enter_context(self._runner)
            self._open(self._runner)
            stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Frees the cache, and the model that it has loaded."""
        if self._cache is not None:
            self._cache.free()
        self._cache = None
        if self._loads:
            self._runner.__exit__()

    def _open(self, runner: Runner) -> None:
        self._specs = {spec.name: spec for spec in runner.inputs}
        pairs = runner_caches(runner)
        if not pairs or LOGITS not in {spec.name for spec in runner.outputs}:
            raise no_decoder(runner.name)
        known = {IDS, MASK, POSITIONS, _TYPES, *pairs}
        unknown = next((name for name in self._specs if name not in known), None)
        if unknown is not None:
            raise BackendError(f"{runner.name} has an input {unknown!r} of unknown meaning.")
        self._cache = open_cache(runner, pairs)

    @property
    def cache(self) -> Cache:
        """The cache, once entered."""
        if self._cache is None:
            raise BackendError(f"{self._runner.name}: a decoder is used outside its with block.")
        return self._cache

    def refuse_unfit(self, batch: int, prompt: int, new_tokens: int) -> None:
        """Refuses what is longer than the context or the graph's tables; it need not be loaded."""
        runner = self._runner
        own = runner.cache_form.longest if isinstance(runner, OnnxRuntimeRunner) else None
        longest = min((size for size in (self._context, own) if size is not None), default=None)
        needed = prompt + new_tokens - 1
        if longest is not None and needed > longest:
            raise BackendError(
                f"{runner.name} has room for {longest} positions; a prompt of {prompt} and "
                f"{new_tokens} new tokens take {needed}.",
                "Take a shorter prompt, fewer new tokens, or a longer context.",
                code="cache-too-short",
            )

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
