"""Where a decoder on a runner keeps its cache.

In arrays that pass through the host; in ONNX Runtime's values that grow; or in its buffers that
stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from exporter.artifacts.latency import Phase
from exporter.engines.decoding.decoder import IDS, LOGITS
from exporter.engines.runners.base import Array, Runner
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.ort_values import host_array
from exporter.engines.tensors import TensorSpec
from exporter.errors import BackendError


class Cache(ABC):
    """The caches of one text after another.

    Args:
        runner: Entered.
        pairs: By cache input, the output that is its next content.
    """

    def __init__(self, runner: Runner, pairs: Mapping[str, str]) -> None:
        self._pairs = pairs
        self._specs = {spec.name: spec for spec in runner.inputs if spec.name in pairs}

    @abstractmethod
    def begin(self, batch: int, positions: int) -> None:
        """Empties them.

        Args:
            batch: Sequences.
            positions: The most that the text will reach.

        Raises:
            BackendError: A cache's size is not known.
        """

    @abstractmethod
    def run(self, tokens: Mapping[str, Array], total: int) -> Array:
        """Runs the model on new tokens and keeps their keys and values.

        Args:
            tokens: The other inputs.
            total: Positions that are filled afterwards.

        Returns:
            The logits, ``[batch, new tokens, vocabulary]``, or those of the last token alone; good
            until the next run.

        Raises:
            BackendError: The run fails, or there is no room.
        """

    @abstractmethod
    def free(self) -> None:
        """Gives the memory back."""

    def _zeros(self, past: str, batch: int, length: int) -> Array:
        spec = self._specs[past]
        return np.zeros(cache_shape(spec, batch, length), spec.dtype)


def open_cache(runner: Runner, pairs: Mapping[str, str]) -> Cache:
    """The cache that runner and graph allow: in place where all of it can be."""
    if not isinstance(runner, OnnxRuntimeRunner):
        return HostCache(runner, pairs)
    in_place = runner.cache_form.shared
    if all(in_place.get(past) == present for past, present in pairs.items()):
        return SharedCache(runner, pairs)
    return GrowingCache(runner, pairs)


class HostCache(Cache):
    """What a step gives for the cache is copied to the host and is the next one's input.

    For judging answers, where the model is loaded already and a second copy of its weights would
    cost more than the copies of the cache.
    """

    def __init__(self, runner: Runner, pairs: Mapping[str, str]) -> None:
        super().__init__(runner, pairs)
        self._runner = runner
        self._arrays: dict[str, Array] = {}

    def begin(self, batch: int, positions: int) -> None:
        """Empties it."""
        self._arrays = {past: self._zeros(past, batch, 0) for past in self._pairs}

    def run(self, tokens: Mapping[str, Array], total: int) -> Array:
        """Runs the model."""
        outputs = [LOGITS, *self._pairs.values()]
        new = tokens[IDS].shape[1]
        phase: Phase = "prefill" if new == total else "decode"
        found = self._runner.run({**tokens, **self._arrays}, outputs, phase=phase)
        self._arrays = {past: found[present] for past, present in self._pairs.items()}
        return found[LOGITS]

    def free(self) -> None:
        """Drops it."""
        self._arrays = {}


class GrowingCache(Cache):
    """What a step gives for the cache is bound as the next one's input, where the model runs."""

    def __init__(self, runner: OnnxRuntimeRunner, pairs: Mapping[str, str]) -> None:
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
        outputs = [LOGITS, *self._pairs.values()]
        given = self._runner.token_values(tokens)
        inputs = {**given, **self._values}
        logits, *presents = self._runner.run_bound(inputs, outputs, on_host=[LOGITS])
        self._values = dict(zip(self._pairs, presents, strict=True))
        return host_array(logits)

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
    """The shape of a cache that holds so much.

    Raises:
        BackendError: The number of heads or the head size is not known.
    """
    heads, size = spec.shape[1], spec.shape[3]
    if not isinstance(heads, int) or not isinstance(size, int):
        raise BackendError(
            f"{spec.name} declares no number of heads or no head size, and the graph doesn't show "
            "them.",
            "Export the model with both; depthcut export writes them.",
            code="head-size-missing",
        )
    return batch, heads, length, size
