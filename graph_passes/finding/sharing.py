"""What a branch alone computes, as against what leads up to it and to others alike."""

from __future__ import annotations

from collections.abc import Set

import onnx_ir as ir

from graph_passes.finding.add_tree import AddTree, Leaf
from graph_passes.finding.dataflow import GraphIndex
from graph_passes.finding.operators import contracts, is_fused_attention

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
    found = {node for node, count in products.items() if node is not None and count > 1}
    last = leaf.value.producer()
    return found if last is None else found | {last}


def _step(node: ir.Node, above: int) -> int:
    if is_fused_attention(node):
        return 2
    if contracts([node]):
        return 1
    return int(above > 0 and node.op_type not in _PASS_ON)
