"""Tells what a mask lets an attention see, by running the part of the graph that makes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from graph_passes.errors import FusionError

MASK, IDS, POSITIONS = "attention_mask", "input_ids", "position_ids"
_HIDDEN = -1e4
"""Added to a score, this or less hides it."""
_CACHE_RANK = 4
_BATCH = 2


def window_of(graph: ir.Graph, mask: ir.Value, positions: int) -> int | None:
    """How far back a mask lets a query see.

    mask: False or a large negative number elsewhere, `[batch or 1, 1, new, total]`.
    """
    probe = Probe(graph, mask)
    longest = _seen(probe, np.ones((_BATCH, positions), np.int64), new=1)
    count = int(longest[-1, -1].sum())
    window = count if count < positions else None
    around = 0 if window is None else window
    for past, new in ((0, 6), (4, 3), (5, 1), (around, 3), (around + 2, 1)):
        total = past + new
        if total > positions:
            continue
        for array in _paddings(total):
            seen, wanted = _seen(probe, array, new), _wanted(array, new, window)
            real = array[:, past:].astype(bool)
            if not np.array_equal(seen[real], wanted[real]):
                raise FusionError(
                    f"The mask {mask.name!r} is none of past, window and padding alone.",
                    code="unknown-mask",
                )
    return window


def _paddings(total: int) -> list[NDArray[Any]]:
    ones = np.ones((_BATCH, total), np.int64)
    left, right = ones.copy(), ones.copy()
    left[1, : total // 3] = 0
    right[1, total - total // 3 :] = 0
    return [ones, left, right]


def _wanted(value: NDArray[Any], new: int, window: int | None) -> NDArray[np.bool_]:
    total = value.shape[1]
    keys, queries = np.arange(total), np.arange(total - new, total)[:, None]
    seen = keys <= queries
    if window is not None:
        seen &= keys > queries - window
    array: NDArray[np.bool_] = seen & value.astype(bool)[:, None, :]
    return array


def _seen(probe: Probe, value: NDArray[Any], new: int) -> NDArray[np.bool_]:
    """What each query sees, ``[batch, new, total]``."""
    batch, total = value.shape
    array = probe.run(_feed(probe.inputs, value, new))
    if array.dtype != np.bool_:
        plain, hidden = array == 0, array <= _HIDDEN
        if not np.all(plain | hidden):
            raise FusionError(
                "An attention adds a bias to its scores that is no mask.", code="unknown-mask"
            )
        array = plain
    if array.ndim != _CACHE_RANK or array.shape[1] != 1:
        raise FusionError("An attention has a mask of its own for each head.")
    return np.broadcast_to(array[:, 0], (batch, new, total))


def _feed(inputs: Mapping[str, ir.Value], array: NDArray[Any], new: int) -> dict[str, NDArray[Any]]:
    batch, total = array.shape
    past = total - new
    known: dict[str, NDArray[Any]] = {
        MASK: array,
        IDS: np.ones((batch, new), np.int64),
        POSITIONS: np.broadcast_to(np.arange(past, total), (batch, new)),
    }
    feed: dict[str, NDArray[Any]] = {}
    for name, value in inputs.items():
        if name in known:
            feed[name] = known[name].astype((value.dtype or ir.DataType.INT64).numpy())
        elif value.shape is not None and len(value.shape) == _CACHE_RANK:
            sizes = (batch, _or_one(value.shape[1]), past, _or_one(value.shape[3]))
            # No memory of its own: only its shape is read, or nothing fits the window.
            feed[name] = np.broadcast_to(np.float32(0), sizes)
        else:
            raise FusionError(f"A mask depends on the input {name!r}.")
    return feed


def _or_one(size: object) -> int:
    return size if isinstance(size, int) else 1


_MOST_NODES = 200
_MOST_BYTES = 1 << 24


class Probe:
    """A value as a function of the graph's inputs."""

    def __init__(self, graph: ir.Graph, value: ir.Value) -> None:
        """Takes the part of the graph that makes a value."""
        self._value = value
        self.inputs = _checked_inputs(value)
        self._evaluator: Any = None
        self._graph = graph

    def run(self, values: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Computes the value."""
        try:
            if self._evaluator is None:
                self._evaluator = _evaluator(self._graph, self._value, self.inputs)
            feed = {name: values[name] for name in self.inputs}
            result = self._evaluator.run(None, feed)[0]
        # The reference implementation has no error class of its own.
        except Exception as error:
            raise FusionError(f"What {self._value.name!r} holds can't be told: {error}.") from error
        return np.asarray(result)


def _evaluator(graph: ir.Graph, value: ir.Value, inputs: Mapping[str, ir.Value]) -> Any:
    part = ir.convenience.extract(graph, list(inputs.values()), [value])
    part.sort()
    model = ir.Model(part, ir_version=10)
    return ReferenceEvaluator(ir.to_proto(model))


def _checked_inputs(value: ir.Value) -> dict[str, ir.Value]:
    """The graph's inputs that a value is made of, by name."""
    results: dict[str, ir.Value] = {}
    seen: set[ir.Value] = set()
    queue, nodes, size = [value], 0, 0
    while queue:
        above = queue.pop()
        if above in seen:
            continue
        seen.add(above)
        node = above.producer()
        if node is not None:
            nodes += 1
            queue.extend(operand for operand in node.inputs if operand is not None)
        elif above.is_graph_input():
            results[above.name or ""] = above
        elif above.const_value is not None:
            size += above.const_value.nbytes
        if nodes > _MOST_NODES or size > _MOST_BYTES:
            raise FusionError(f"{value.name!r} is made by a large part of the model.")
    return results
