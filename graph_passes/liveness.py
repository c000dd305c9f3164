"""What dies with a branch: its nodes and its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import onnx_ir as ir

from graph_passes.add_tree import Leaf
from graph_passes.dataflow import GraphIndex, is_shape_read


def dying_nodes(
    index: GraphIndex, leaves: Sequence[Leaf], outputs: Collection[ir.Value]
) -> frozenset[ir.Node]:
    """The nodes that nothing needs once a branch and its graph outputs are gone.

    Readers of a mere shape don't keep a node alive: they are pointed to another value of the
    same shape.

    Args:
        index: The graph.
        leaves: The branch's operands in its sum.
        outputs: The graph outputs that go with it.
    """
    joints = {(leaf.value, leaf.joint) for leaf in leaves}
    dead: set[ir.Node] = set()

    def needed(value: ir.Value) -> bool:
        if value.is_graph_output() and value not in outputs:
            return True
        return any(
            reader not in dead and not is_shape_read(reader) and (value, reader) not in joints
            for reader in index.readers(value)
        )

    queue = [leaf.value.producer() for leaf in leaves] + [v.producer() for v in outputs]
    while queue:
        node = queue.pop()
        if node is None or node in dead or any(needed(value) for value in node.outputs):
            continue
        dead.add(node)
        queue.extend(value.producer() for value in index.reads(node))
    return frozenset(dead)


def own_parameters(dying: Iterable[ir.Node]) -> int:
    """How many weights only dying nodes use."""
    dead = set(dying)
    weights = {
        value for node in dead for value in node.inputs if value is not None and is_weight(value)
    }
    return sum(
        value.const_value.size
        for value in weights
        if value.const_value is not None and all(user in dead for user in value.consumers())
    )


def is_weight(value: ir.Value) -> bool:
    """Whether a value is a parameter: an initializer, but no shape arithmetic, mask or scalar."""
    tensor = value.const_value
    return (
        value.is_initializer()
        and tensor is not None
        and tensor.size > 1
        and tensor.dtype not in _NO_PARAMETERS
    )


_NO_PARAMETERS = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.STRING}
