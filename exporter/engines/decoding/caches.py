"""Where a decoder on ONNX Runtime keeps its cache: in values that grow, or in buffers that stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from exporter.engines.decoding.cache_names import LOGITS
from exporter.engines.runners.base import TensorSpec
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import BackendError

IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
"""The inputs that follow from the tokens."""


class Cache(Protocol):
    """The caches of one text after another."""

    def begin(self, batch: int, positions: int) -> None:
        """Empties them.

        Args:
            batch: Sequences.
            positions: The most that the text will reach.

        Raises:
            BackendError: A cache's size is not known.
        """

    def run(self, tokens: Mapping[str, Any], total: int) -> Any:
        """Runs the model on new tokens and keeps their keys and values.

        Args:
            tokens: Values of the other inputs.
            total: Positions that are filled afterwards.

        Returns:
            The logits as a value, ``[batch, new tokens, vocabulary]``, good until the next run.

        Raises:
            BackendError: The run fails, or there is no room.
        """

    def free(self) -> None:
        """Gives the memory back."""


def open_cache(runner: OnnxRuntimeRunner, pairs: Mapping[str, str]) -> Cache:
    """The cache that the graph's form allows: in place where all of it can be.

    Args:
        runner: Entered.
        pairs: By cache input, the output that is its next content.
    """
    in_place = runner.cache_form.shared
    if all(in_place.get(past) == present for past, present in pairs.items()):
        return SharedCache(runner, pairs)
    return GrowingCache(runner, pairs)


class GrowingCache:
    """What a step gives for the cache is bound as the next one's input; see :class:`Cache`."""

    def __init__(self, runner: OnnxRuntimeRunner, pairs: Mapping[str, str]) -> None:
        self._runner = runner
        self._pairs = pairs
        self._values: dict[str, Any] = {}

    def begin(self, batch: int, positions: int) -> None:
        """Empties it; see the protocol."""
        specs = _specs(self._runner)
        self._values = {
            past: self._runner.value(
                np.zeros(cache_shape(specs[past], batch, 0), specs[past].dtype)
            )
            for past in self._pairs
        }

    def run(self, tokens: Mapping[str, Any], total: int) -> Any:
        """Runs the model; see the protocol."""
        outputs = [LOGITS, *self._pairs.values()]
        logits, *presents = self._runner.run_bound({**tokens, **self._values}, outputs)
        self._values = dict(zip(self._pairs, presents, strict=True))
        return logits

    def free(self) -> None:
        """Drops it."""
        self._values = {}


class SharedCache:
    """One buffer for each cache, with room for the whole text; nothing is copied between steps.

    The buffers and the bindings to them are made once, and kept as long as texts of the same size
    follow each other: what a former text has left lies beyond what the mask calls filled.
    See :class:`Cache`.
    """

    def __init__(self, runner: OnnxRuntimeRunner, pairs: Mapping[str, str]) -> None:
        self._runner = runner
        self._pairs = pairs
        self._size = (0, 0)
        self.buffers: dict[str, Any] = {}
        self._binding: Any = None
        self._tokens: Mapping[str, Any] = {}
        self._logits: Any = None

    def begin(self, batch: int, positions: int) -> None:
        """Makes room, where it isn't there already; see the protocol."""
        form = self._runner.cache_form
        size = (batch, form.buffer or positions)
        if size == self._size:
            return
        self.free()
        specs = _specs(self._runner)
        for past in self._pairs:
            shape = cache_shape(specs[past], batch, form.length(past, positions))
            self.buffers[past] = self._runner.value(np.zeros(shape, specs[past].dtype))
        self._size = size

    def run(self, tokens: Mapping[str, Any], total: int) -> Any:
        """Runs the model; see the protocol."""
        room = self._size[1]
        if total > room:
            raise BackendError(
                f"{self._runner.model}: the text reaches {total} positions; the cache has room for "
                f"{room}.",
                "Ask for a longer context.",
            )
        if tokens[IDS].shape()[1] != 1:
            return self._answer(self._bound(), tokens)
        if self._binding is None:
            self._binding = self._bound()
            self._logits = self._answer(self._binding, tokens)
            # Bound again as a value, it is the buffer of all later steps.
            self._binding.bind_ortvalue_output(LOGITS, self._logits)
        else:
            self._feed(self._binding, tokens)
            self._runner.run_binding(self._binding)
        return self._logits

    def free(self) -> None:
        """Drops the buffers."""
        self.buffers, self._size = {}, (0, 0)
        self._binding = self._logits = None
        self._tokens = {}

    def _answer(self, binding: Any, tokens: Mapping[str, Any]) -> Any:
        """Runs a binding whose logits have no buffer yet."""
        self._feed(binding, tokens)
        binding.bind_output(LOGITS, self._runner.device)
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
        )
    return batch, heads, length, size


def _specs(runner: OnnxRuntimeRunner) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in runner.inputs}
