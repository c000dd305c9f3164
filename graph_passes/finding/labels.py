"""What a branch is, told by its operators, and which layer it belongs to, told by its order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence, Set
from itertools import pairwise

import onnx_ir as ir

from graph_passes.finding.dataflow import CONTRACTIONS, Dominators, GraphIndex, factors
from graph_passes.finding.operators import is_fused_attention, is_opaque, mixes_tokens
from graph_passes.types import SublayerKind, SublayerRef

_SOFTMAX = frozenset({"Softmax", "BiasSoftmax", "QLinearSoftmax", "Exp"})
"""Exp stands for a softmax in single steps."""
_VIEWS = frozenset(
    {"Gather", "Transpose", "Reshape", "Cast", "Identity", "Unsqueeze", "Squeeze", "Slice"}
    | {"Split", "DequantizeLinear", "GatherND", "GatherElements", "GatherBlockQuantized", "Expand"}
)
RANK: dict[SublayerKind, int] = {"attention": 0, "mixer": 0, "cross_attention": 1, "mlp": 2}
"""The order of sublayers within a layer."""


def branch_kind(index: GraphIndex, dominators: Dominators, nodes: Set[ir.Node]) -> SublayerKind:
    """Tells what a branch is.

    Attention is a fused attention operator, or a Softmax over the product of two activations, or
    such a product that goes into another one. A router's Softmax stands over activation times
    weight and doesn't count. Where keys come from outside the stream, it is cross attention.
    """
    operands = _attention_operands(index, nodes)
    mixer = any(mixes_tokens(node) for node in nodes)
    if operands is None and not mixer:
        operands = _chained_products(index, nodes)
    if operands is None:
        return "mixer" if mixer else "mlp"
    own = all(dominators.descends(value) for value in operands)
    return "attention" if own else "cross_attention"


def _attention_operands(
    index: GraphIndex, nodes: Set[ir.Node], branch: Set[ir.Node] = frozenset()
) -> Sequence[ir.Value] | None:
    """The activations that an attention multiplies; None where the nodes hold no attention."""
    for node in sorted(nodes, key=index.position.__getitem__):
        if is_fused_attention(node):
            return [value for value in node.inputs[:3] if value in index.varying]
        if node.op_type in _SOFTMAX and (operands := _score_operands(index, node, branch or nodes)):
            return operands
    return None


def chained_attentions(index: GraphIndex, nodes: Set[ir.Node]) -> int:
    """How many attentions follow each other among nodes; those of single heads don't."""
    depths: dict[ir.Node | None, int] = {}
    for node in sorted(nodes, key=index.position.__getitem__):
        above = max((depths.get(v.producer(), 0) for v in index.data_reads(node)), default=0)
        depths[node] = above + bool(_attention_operands(index, {node}, nodes))
    return max(depths.values(), default=0)


def _chained_products(index: GraphIndex, nodes: Set[ir.Node]) -> Sequence[ir.Value] | None:
    """The operands of a product of activations that goes into another such product.

    Only attention does that, also where something else than a softmax stands between the two.
    """
    for node in sorted(nodes, key=index.position.__getitem__):
        is_product = node.op_type in CONTRACTIONS and len(_activations(index, node)) > 1
        if is_product and (operands := _score_operands(index, node, nodes)):
            return operands
    return None


def _score_operands(
    index: GraphIndex, start: ir.Node, nodes: Set[ir.Node]
) -> Sequence[ir.Value] | None:
    """The operands of the nearest contraction above a node, if both are activations."""
    seen: set[ir.Node] = set()
    queue = [start]
    while queue:
        node = queue.pop()
        for value in index.data_reads(node):
            above = value.producer()
            if above is None or above not in nodes or above in seen:
                continue
            seen.add(above)
            if above.op_type not in CONTRACTIONS:
                queue.append(above)
            elif len(operands := _activations(index, above)) > 1:
                return operands
    return None


def _activations(index: GraphIndex, node: ir.Node) -> list[ir.Value]:
    """The factors of a contraction that are no weights; an expert's weight may be picked first."""
    return [value for value in factors(node) if not _is_weight(index, value)]


def _is_weight(index: GraphIndex, value: ir.Value) -> bool:
    while value in index.varying:
        node = value.producer()
        above = node.inputs[0] if node is not None and node.op_type in _VIEWS else None
        if above is None:
            return False
        value = above
    return True


def opaque_node(index: GraphIndex, nodes: Set[ir.Node]) -> ir.Node | None:
    """A node of a branch without attention of which it can't be told what it does."""
    if _attention_operands(index, nodes) is not None:
        return None
    return next((n for n in sorted(nodes, key=index.position.__getitem__) if is_opaque(n)), None)


def ambiguous_mixer(
    groups: Sequence[Sequence[SublayerKind]],
    numbers: Sequence[Sequence[int]],
    missing: Iterable[SublayerRef],
    stateful: Collection[int] = (),
) -> int | None:
    """The first group that may be an MLP with a convolution, or a mixer of the next layer.

    That can't be told where it follows an attention whose layer has no MLP yet, unless it keeps a
    state for the next step.
    """
    gone = set(missing)
    for place, (before, kinds) in enumerate(pairwise(groups), start=1):
        unfinished = RANK["mlp"] not in {RANK[kind] for kind in before}
        attends = any("attention" in kind for kind in before)
        had_mlp = SublayerRef(numbers[place - 1][-1], "mlp") in gone
        doubtful = "mixer" in kinds and place not in stateful
        if doubtful and attends and unfinished and not had_mlp:
            return place
    return None


def number_layers(
    groups: Sequence[Sequence[SublayerKind]], missing: Iterable[SublayerRef]
) -> list[list[int]]:
    """Numbers sublayers by their order along the stream.

    A layer is attention (or another mixer), then cross attention, then MLP, each at most once:
    what doesn't follow in that order begins the next layer. Branches that join in one sum belong
    to one layer. Sublayers that were cut out earlier keep their places.
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
