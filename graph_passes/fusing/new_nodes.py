"""Makes nodes and initializers of names that are free, and puts them where they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


class NewNodes:
    """Collects new nodes until they are put before one that is there."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self._graph = graph
        self._prefix = prefix
        self._nodes: list[ir.Node] = []
        values = (*graph.inputs, *(value for node in graph for value in node.outputs))
        self._taken = {value.name for value in values} | set(graph.initializers)
        self._count = 0

    def op(
        self,
        op_type: str,
        *inputs: ir.Value,
        **attributes: int | float | str | Sequence[int] | ir.TensorProtocol,
    ) -> ir.Value:
        """A node with one output."""
        node = ir.node(op_type, list(inputs), attributes or None)
        node.outputs[0].name = node.name = self._name()
        self._nodes.append(node)
        return node.outputs[0]

    def integers(self, numbers: Sequence[int] | int) -> ir.Value:
        """An initializer int64, ``[count]`` or a scalar."""
        return self._constant(np.array(numbers, np.int64))

    def floats(self, numbers: NDArray[np.float32]) -> ir.Value:
        """An initializer float32."""
        return self._constant(np.ascontiguousarray(numbers, np.float32))

    def _constant(self, numbers: NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(numbers, name=self._name())
        value = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.numpy().shape),
            const_value=tensor,
        )
        self._graph.register_initializer(value)
        return value

    def put_before(self, node: ir.Node) -> None:
        """Puts what was collected into the graph."""
        self._graph.insert_before(node, self._nodes)
        self._nodes = []

    def append(self) -> None:
        """Puts it at the end of the graph."""
        self._graph.extend(self._nodes)
        self._nodes = []

    def _name(self) -> str:
        while (name := f"{self._prefix}_{self._count}") in self._taken:
            self._count += 1
        self._taken.add(name)
        return name
