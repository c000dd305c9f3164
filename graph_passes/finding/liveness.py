"""What dies with a branch: its nodes and its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import onnx_ir as ir

from graph_passes.finding.add_tree import Leaf
from graph_passes.finding.dataflow import GraphIndex, is_shape_read
from graph_passes.finding.weights import is_weight, parameters


def dying_nodes(
    index: GraphIndex, leaves: Sequence[Leaf], outputs: Collection[ir.Value]
) -> frozenset[ir.Node]:
    """The nodes that nothing needs once a branch and its graph outputs are gone.

    Readers of a mere shape don't keep a node alive: they are pointed to another value of the
    same shape.
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
    """How many parameters only dying nodes use."""
    dead = set(dying)
    read = {value for node in dead for value in node.inputs if value is not None}
    return sum(
        parameters(value)
        for value in read
        if is_weight(value) and all(user in dead for user in value.consumers())
    )
