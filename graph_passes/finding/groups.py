"""The sums along the stream that join sublayers, and what each sublayer is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain

from graph_passes.finding.add_tree import AddTree, Leaf
from graph_passes.finding.branch_input import is_linear_map
from graph_passes.finding.labels import (
    RANK,
    ambiguous_mixer,
    branch_kind,
    number_layers,
    opaque_node,
)
from graph_passes.finding.operators import contracts
from graph_passes.finding.sharing import own_nodes
from graph_passes.finding.stream import Stream
from graph_passes.types import Refusal, SublayerKind, SublayerRef

Group = tuple[AddTree, dict[SublayerKind, list[Leaf]]]
"""A sum, and the branches of each kind that join in it, in the layer's order."""
_AMBIGUOUS = (
    "it can't be told whether the branch is an MLP with a convolution or loop, "
    "or a mixer that begins the next layer"
)


def groups_of(stream: Stream, missing: frozenset[SublayerRef], linear: int) -> list[Group] | None:
    """The sums that join sublayers, in stream order; None where they can't be told apart.

    Linear maps in the places of what was cut out earlier are none, nor is a position embedding.
    """
    skipped: set[Leaf] = set()
    if linear:
        skipped.update(
            leaf
            for tree in stream.trees
            for leaf in tree.leaves
            if is_linear_map(stream.index, own_nodes(tree, leaf))
        )
    if len(skipped) != linear:
        return None
    found = [(tree, _branches_by_kind(stream, tree, skipped)) for tree in stream.trees]
    groups = [(tree, kinds) for tree, kinds in found if kinds]
    return groups[1:] if _begins_with_positions(groups, missing) else groups


def _begins_with_positions(groups: Sequence[Group], missing: frozenset[SublayerRef]) -> bool:
    """Whether the first sum adds a convolution before the layers: that is a position embedding.

    A mixer would have products of its own, or an MLP behind it in its layer.
    """
    if len(groups) < 2 or list(groups[0][1]) != ["mixer"]:
        return False
    (leaf, *others) = groups[0][1]["mixer"]
    alone = not others and sum(contracts([node]) for node in leaf.nodes) == 1
    before_attention = "attention" in groups[1][1] or SublayerRef(0, "attention") in missing
    return alone and before_attention


def label_refusal(
    stream: Stream, groups: Sequence[Group], missing: frozenset[SublayerRef]
) -> Refusal | None:
    """A branch of which the kind can't be told: it might shift the numbers of all after it."""
    for tree, kinds in groups:
        for leaf in chain.from_iterable(kinds.values()):
            node = opaque_node(stream.index, own_nodes(tree, leaf))
            if node is not None:
                reason = f"it can't be told what kind of sublayer this {node.op_type} belongs to"
                return Refusal(None, None, node.name or "", reason, "unknown-kind")
    labels = [list(kinds) for _, kinds in groups]
    stateful = [place for place, group in enumerate(groups) if _keeps_state(stream, *group)]
    place = ambiguous_mixer(labels, number_layers(labels, missing), missing, stateful)
    if place is None:
        return None
    name = groups[place][0].add.name or ""
    return Refusal(None, None, name, _AMBIGUOUS, "ambiguous-mixer")


def _keeps_state(
    stream: Stream, tree: AddTree, kinds: Mapping[SublayerKind, Sequence[Leaf]]
) -> bool:
    return any(stream.own_outputs(own_nodes(tree, leaf)) for leaf in kinds.get("mixer", ()))


def _branches_by_kind(
    stream: Stream, tree: AddTree, skipped: Collection[Leaf]
) -> dict[SublayerKind, list[Leaf]]:
    """The leaves that are branches of a sublayer, in the layer's order; one kind goes together."""
    kinds: dict[SublayerKind, list[Leaf]] = {}
    for leaf in tree.leaves:
        if leaf not in skipped and contracts(leaf.nodes):
            own = own_nodes(tree, leaf)
            kind = branch_kind(stream.index, stream.dominators, own)
            kinds.setdefault(kind, []).append(leaf)
    return {kind: kinds[kind] for kind in sorted(kinds, key=RANK.__getitem__)}
