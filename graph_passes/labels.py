"""What a branch is, told by its operators, and which layer it belongs to, told by its order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence, Set

import onnx_ir as ir

from graph_passes.dataflow import CONTRACTIONS, GraphIndex
from graph_passes.dominators import Dominators
from graph_passes.types import SublayerKind, SublayerRef

_FUSED_ATTENTION = frozenset(
    {"Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedMultiHeadAttention"}
    | {"DecoderMaskedMultiHeadAttention", "PagedAttention", "SparseAttention"}
)
_MIXERS = frozenset({"Conv", "Scan", "Loop", "LinearAttention", "CausalConvWithState"})
RANK: dict[SublayerKind, int] = {"attention": 0, "mixer": 0, "cross_attention": 1, "mlp": 2}
"""The order of sublayers within a layer."""


def branch_kind(index: GraphIndex, dominators: Dominators, nodes: Set[ir.Node]) -> SublayerKind:
    """Tells what a branch is.

    Attention is a fused attention operator, or a Softmax over the product of two activations. A
    router's Softmax stands over activation times weight and doesn't count. Where keys come from
    outside the stream, it is cross attention.

    Args:
        index: The graph.
        dominators: Its dominator tree from the data input.
        nodes: The nodes between the skip and the branch's end.
    """
    for node in sorted(nodes, key=index.position.__getitem__):
        operands = _attention_operands(index, node, nodes)
        if operands:
            own = all(dominators.descends(value) for value in operands)
            return "attention" if own else "cross_attention"
    return "mixer" if any(node.op_type in _MIXERS for node in nodes) else "mlp"


def _attention_operands(
    index: GraphIndex, node: ir.Node, nodes: Set[ir.Node]
) -> Sequence[ir.Value] | None:
    """The activations that an attention multiplies; None where ``node`` is no attention."""
    if node.op_type in _FUSED_ATTENTION:
        return [value for value in node.inputs[:3] if value in index.varying]
    if node.op_type != "Softmax":
        return None
    return _score_operands(index, node, nodes)


def _score_operands(
    index: GraphIndex, softmax: ir.Node, nodes: Set[ir.Node]
) -> Sequence[ir.Value] | None:
    """The operands of the nearest contraction above a Softmax, if both are activations."""
    seen: set[ir.Node] = set()
    queue = [softmax]
    while queue:
        node = queue.pop()
        for value in index.data_reads(node):
            above = value.producer()
            if above is None or above not in nodes or above in seen:
                continue
            seen.add(above)
            if above.op_type not in CONTRACTIONS:
                queue.append(above)
            elif len(operands := _varying_operands(index, above)) > 1:
                return operands
    return None


def _varying_operands(index: GraphIndex, node: ir.Node) -> list[ir.Value]:
    """A node's operands that depend on a graph input."""
    return [value for value in index.reads(node) if value in index.varying]


def is_fused_attention(node: ir.Node) -> bool:
    """Whether a single operator is a whole attention."""
    return node.op_type in _FUSED_ATTENTION


def contracts(nodes: Iterable[ir.Node]) -> bool:
    """Whether nodes that make up a branch do any real work."""
    return any(node.op_type in CONTRACTIONS or node.op_type in _FUSED_ATTENTION for node in nodes)


def number_layers(
    groups: Sequence[Sequence[SublayerKind]], missing: Iterable[SublayerRef]
) -> list[list[int]]:
    """Numbers sublayers by their order along the stream.

    A layer is attention (or another mixer), then cross attention, then MLP, each at most once:
    what doesn't follow in that order begins the next layer. Branches that join in one sum belong
    to one layer. Sublayers that were cut out earlier keep their places.

    Args:
        groups: For each sum along the stream, the kinds of the branches that it joins.
        missing: What was cut out earlier.

    Returns:
        For each group, the layer of each of its branches.
    """
    gone: dict[int, set[SublayerKind]] = defaultdict(set)
    for ref in missing:
        gone[ref.layer].add(ref.kind)
    layer, seen = 0, set[SublayerKind]()
    numbers = []
    for kinds in groups:
        while not _fits(kinds, seen, gone[layer]):
            layer, seen = layer + 1, set()
        seen.update(kinds)
        numbers.append([layer] * len(kinds))
    return numbers


def _fits(kinds: Sequence[SublayerKind], seen: Set[SublayerKind], gone: Set[SublayerKind]) -> bool:
    last = max((RANK[kind] for kind in seen), default=-1)
    return all(RANK[kind] > last and kind not in gone for kind in kinds)
