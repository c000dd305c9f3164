"""Runs a small part of a graph on chosen inputs, to see what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from graph_passes.errors import FusionError

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
            found = self._evaluator.run(None, feed)[0]
        # The reference implementation has no error class of its own.
        except Exception as error:
            raise FusionError(f"What {self._value.name!r} holds can't be told: {error}.") from error
        return np.asarray(found)


def _evaluator(graph: ir.Graph, value: ir.Value, inputs: Mapping[str, ir.Value]) -> Any:
    part = ir.convenience.extract(graph, list(inputs.values()), [value])
    part.sort()
    model = ir.Model(part, ir_version=10)
    return ReferenceEvaluator(ir.to_proto(model))


def _checked_inputs(value: ir.Value) -> dict[str, ir.Value]:
    """The graph's inputs that a value is made of, by name."""
    found: dict[str, ir.Value] = {}
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
            found[above.name or ""] = above
        elif above.const_value is not None:
            size += above.const_value.nbytes
        if nodes > _MOST_NODES or size > _MOST_BYTES:
            raise FusionError(f"{value.name!r} is made by a large part of the model.")
    return found
