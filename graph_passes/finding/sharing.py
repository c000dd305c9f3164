"""What a branch alone computes, and what dies with it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence, Set

import onnx_ir as ir

from graph_passes.finding.add_tree import AddTree, Leaf
from graph_passes.finding.dataflow import GraphIndex, is_shape_read
from graph_passes.finding.operators import contracts, is_fused_attention
from graph_passes.finding.weights import is_weight, parameters

_PASS_ON = frozenset(
    {"Add", "Mul", "Cast", "Identity", "DequantizeLinear", "Split", "Slice", "Gather", "Expand"}
    | {"Reshape", "Transpose", "Squeeze", "Unsqueeze"}
)
"""What may stand between one product for several branches and the parts that each takes of it."""


def own_nodes(tree: AddTree, leaf: Leaf) -> frozenset[ir.Node]:
    """A leaf's nodes without those of other leaves that it is computed from."""
    nested = (
        other.nodes
        for other in tree.leaves
        if other is not leaf and other.value.producer() in leaf.nodes
    )
    return leaf.nodes.difference(*nested)


def results(index: GraphIndex, leaf: Leaf, own: Set[ir.Node]) -> set[ir.Node]:
    """The nodes that compute what is the branch's own work, and no preparation of it.

    Parallel branches may share a norm, and one product for all their first projections. What
    lies behind those is a result: the leaf itself, and what is multiplied again or goes through
    a nonlinear operator.
    """
    products: dict[ir.Node | None, int] = {}
    for node in sorted(own, key=index.position.__getitem__):
        above = max((products.get(v.producer(), 0) for v in index.data_reads(node)), default=0)
        products[node] = above + _step(node, above)
    nodes = {node for node, count in products.items() if node is not None and count > 1}
    last = leaf.value.producer()
    return nodes if last is None else nodes | {last}


def _step(node: ir.Node, above: int) -> int:
    if is_fused_attention(node):
        return 2
    if contracts([node]):
        return 1
    return int(above > 0 and node.op_type not in _PASS_ON)


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
