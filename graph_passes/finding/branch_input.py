"""What all of a branch's work is computed from: as a rule the output of the norm before it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import takewhile

import onnx_ir as ir

from graph_passes.finding.add_tree import AddTree, Leaf, common_origin
from graph_passes.finding.dataflow import CONTRACTIONS, Dominators, GraphIndex, has_weight
from graph_passes.finding.operators import contracts, is_unknown
from graph_passes.finding.sharing import own_nodes

_QUANTISATION = frozenset({"QuantizeLinear", "DequantizeLinear"})
_NORM_PIECES = _QUANTISATION | frozenset(
    {"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "LpNormalization"}
    | {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Neg", "Max", "Clip"}
    | {"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Cast", "CastLike", "Identity"}
)
"""What a norm, a scale or a change of type is made of."""
_WHOLE_MLPS = frozenset({"MoE", "QMoE"})


def branch_input(
    index: GraphIndex, dominators: Dominators, tree: AddTree, leaves: Sequence[Leaf]
) -> ir.Value | str:
    """The last value that everything flows through on the way from the stream into a branch.

    Nothing but norms, scales and changes of type stand before it. Where the branch begins with
    its product, that is the stream itself, as the sum takes it. Quantisation between the norm
    and the product is left out.

    The value ``[..., hidden]``, or the reason why there is none.
    """
    origin = common_origin(dominators, tree.add, tree.skip)
    own = [own_nodes(tree, leaf) for leaf in leaves]
    chains = [
        _preparation(index, nodes, origin, leaf.value)
        for nodes, leaf in zip(own, leaves, strict=True)
    ]
    shared = [step[0] for step in takewhile(_is_one, zip(*chains, strict=False))]
    if not shared:
        return "the branch is not computed from the stream that it joins"
    nodes = set[ir.Node]().union(*own)
    readers = (node for node in index.readers(shared[-1]) if node in nodes)
    unknown = next(filter(is_unknown, readers), None)
    if unknown is not None:
        return (
            f"it can't be told whether {unknown.op_type} {unknown.name!r}, with which the branch "
            "begins, is its norm"
        )
    value = _before_quantisation(shared)
    return tree.skip if value is origin else value


def _preparation(
    index: GraphIndex, nodes: Set[ir.Node], origin: ir.Value, end: ir.Value
) -> list[ir.Value]:
    """The origin, then each value that all of a branch flows through, up to its first real work."""
    order = sorted(nodes, key=index.position.__getitem__)
    inner = Dominators(index, origin, order)
    if not inner.descends(end):
        return []
    prepared = {origin}
    for node in order:
        if node.op_type in _NORM_PIECES and all(
            value in prepared or value not in index.varying for value in index.reads(node)
        ):
            prepared.update(node.outputs)
    chain = [end]
    while chain[-1] is not origin:
        chain.append(inner.immediate(chain[-1]))
    return list(takewhile(prepared.__contains__, reversed(chain)))


def _is_one(values: Sequence[ir.Value]) -> bool:
    return all(value is values[0] for value in values)


def _before_quantisation(chain: Sequence[ir.Value]) -> ir.Value:
    """The last of the values that is no quantised form of the one before it."""
    place = len(chain) - 1
    while place and _is_quantised(chain[place]):
        place -= 1
    return chain[place]


def _is_quantised(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type in _QUANTISATION


def is_linear_map(index: GraphIndex, nodes: Set[ir.Node]) -> bool:
    """Whether a branch does nothing but one product with a weight; every sublayer does more."""
    working = [node for node in nodes if contracts([node])]
    return len(working) == 1 and all(
        node.op_type in CONTRACTIONS - _WHOLE_MLPS and has_weight(index, node) for node in working
    )
