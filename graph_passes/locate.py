"""Finds where each sublayer joins the residual stream, or says why it can't be cut there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import onnx_ir as ir

from graph_passes.finding.add_tree import AddTree, Leaf
from graph_passes.finding.branch_input import branch_input, is_linear_map
from graph_passes.finding.caches import goes, own_caches, shown_keys
from graph_passes.finding.dataflow import GraphIndex, is_add, is_shape_read
from graph_passes.finding.labels import (
    RANK,
    ambiguous_mixer,
    branch_kind,
    chained_attentions,
    number_layers,
    opaque_node,
)
from graph_passes.finding.operators import contracts
from graph_passes.finding.preconditions import graph_refusal, hidden_part
from graph_passes.finding.shapes import broadcast_reason
from graph_passes.finding.sharing import dying_nodes, own_nodes, own_parameters
from graph_passes.finding.stream import Stream, streams
from graph_passes.fused_norms import taken_apart
from graph_passes.plan_record import recorded, recorded_replacements
from graph_passes.types import Refusal, ResidualSite, SublayerKind, SublayerRef

_NO_ATTENTION = "no attention joins a residual stream: this is no Transformer that can be cut"
_TOKEN_TYPES = {ir.DataType.INT64, ir.DataType.INT32}
_HIDDEN = (
    "a sublayer may join the stream here in another form than x + f(x), "
    "so the layers can't be numbered"
)
_LOST_LINEAR = (
    "its record names linear maps in the places of deleted branches, which can't be told from "
    "the branches that are left"
)
_STACKS = frozenset({"Concat", "ScatterND", "ScatterElements"})
"""What puts streams together that run side by side."""
_SEVERAL = "several residual streams meet here; only a single stream can be cut"


class Obstacle(NamedTuple):
    """Where and why a sublayer can't be cut; ``code`` is a short name for the reason."""

    node: ir.Node
    reason: str
    code: str


@dataclass(frozen=True, eq=False)
class FoundSite:
    """A sublayer with the graph's own objects in hand; valid until the graph changes."""

    layer: int
    kind: SublayerKind
    tree: AddTree
    leaves: tuple[Leaf, ...]
    dying: frozenset[ir.Node]
    caches: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    obstacle: Obstacle | None  # why it can't be cut; None where it can
    branch_input: ir.Value | str

    @property
    def ref(self) -> SublayerRef:
        """The sublayer's public name."""
        return SublayerRef(self.layer, self.kind)

    def describe(self) -> ResidualSite | Refusal:
        """The site in plain data."""
        if self.obstacle is not None:
            node, reason, code = self.obstacle
            return Refusal(self.layer, self.kind, node.name or "", reason, code)
        return ResidualSite(
            layer=self.layer,
            kind=self.kind,
            residual_add=self.tree.add.name or "",
            skip=self.tree.skip.name or "",
            branches=tuple(leaf.value.name or "" for leaf in self.leaves),
            parameters=own_parameters(self.dying),
            kv_inputs=tuple(value.name or "" for value in self.caches),
            kv_outputs=tuple(value.name or "" for value in self.outputs),
            branch_input=None if isinstance(self.branch_input, str) else self.branch_input.name,
        )


@dataclass(frozen=True)
class Findings:
    """What a graph holds: its sublayers in stream order, and refusals that belong to no layer."""

    sites: tuple[FoundSite, ...]
    refusals: tuple[Refusal, ...]

    def describe(self) -> list[ResidualSite | Refusal]:
        """All of it in plain data."""
        return [*(site.describe() for site in self.sites), *self.refusals]


def find_sites(model: ir.Model) -> list[ResidualSite | Refusal]:
    """Finds the sublayers of a Transformer's graph.

    The residual stream is what every data path from the data input to the first output passes
    through. A site is an Add on the stream, alone or fused with the norm after it, of which one
    operand, the skip, is on the stream too, and the others descend from it through at least one
    matrix product. Layers are numbered in stream order; sublayers that depthcut cut out earlier
    keep their numbers.

    Args:
        model: The model; it is not changed, and its weights are not read.

    Returns:
        A :class:`ResidualSite` for each sublayer that can be cut, in stream order, a
        :class:`Refusal` in the place of each that can't, and at the end a refusal for each part
        of the graph that could not be searched. A graph that is no Transformer gives refusals
        only.
    """
    return survey(model).describe()


def survey(model: ir.Model) -> Findings:
    """:func:`find_sites` with objects of the graph, or of a copy where sums are fused."""
    refusal = graph_refusal(model)
    if refusal is not None:
        return Findings((), (refusal,))
    return locate(taken_apart(model))


def locate(model: ir.Model) -> Findings:
    """:func:`find_sites` with the graph's own objects, for the code that cuts.

    The graph must be one that :func:`survey` took. Fused sums must have been taken apart; a graph
    that has one left is refused.
    """
    index = GraphIndex(model.graph)
    result = streams(index)
    if not result:
        return Findings((), (_refuse(index, "no data path leads from an input to it", "no-path"),))
    refusal = _stream_refusal(result)
    if refusal is not None:
        return Findings((), (refusal,))
    missing = recorded(model)
    linear = [r for r in recorded_replacements(model).values() if r.kind == "linear"]
    groups = groups_of(result[0], missing, len(linear))
    if groups is None:
        return Findings((), (_refuse(index, _LOST_LINEAR, "lost-linear"),))
    refusal = label_refusal(result[0], groups, missing)
    if refusal is not None:
        return Findings((), (refusal,))
    sites = _without_shared_outputs(_sites(result[0], groups, missing))
    if not missing and not any(_mixes_a_sequence(result[0], site) for site in sites):
        return Findings((), (_refuse(index, _NO_ATTENTION, "no-attention"),))
    return Findings(tuple(sites), ())


def _mixes_a_sequence(stream: Stream, site: FoundSite) -> bool:
    """Whether a sublayer is an attention, or a mixer that reads tokens and no picture."""
    reads_tokens = stream.source.dtype in _TOKEN_TYPES
    return "attention" in site.kind or (site.kind == "mixer" and reads_tokens)


def _stream_refusal(items: Sequence[Stream]) -> Refusal | None:
    """Why the best of the streams can't be trusted to show every sublayer in its place."""
    stream, *others = items
    refusal = hidden_part(stream)
    if refusal is not None:
        return refusal
    for other in others:
        if (stranger := stream.misses(other)) is not None:
            reason = (
                f"one stream begins at {stream.source.name!r} and another at "
                f"{other.source.name!r}; only a graph of a single model can be cut"
            )
            return Refusal(None, None, stranger.name or "", reason, "several-models")
    if (meeting := stream.meeting_point()) is not None:
        return Refusal(None, None, meeting.name or "", _SEVERAL, "several-streams")
    position = stream.index.position.__getitem__
    hidden = [(max(span, key=position), span) for span in stream.hidden_work()]
    for node, span in hidden:
        if node.op_type in _STACKS or chained_attentions(stream.index, span) > 1:
            return Refusal(None, None, node.name or "", _SEVERAL, "several-streams")
    if not hidden:
        return None
    return Refusal(None, None, hidden[0][0].name or "", _HIDDEN, "hidden-sublayer")


def _refuse(index: GraphIndex, reason: str, code: str) -> Refusal:
    output = index.graph.outputs[0]
    producer = output.producer()
    name = producer.name if producer is not None else output.name
    return Refusal(None, None, name or "", reason, code)


def _sites(
    stream: Stream, groups: Sequence[Group], missing: frozenset[SublayerRef]
) -> list[FoundSite]:
    numbers = number_layers([list(kinds) for _, kinds in groups], missing)
    return [
        _site(stream, layer, kind, tree, tuple(leaves))
        for (tree, kinds), layers in zip(groups, numbers, strict=True)
        for layer, (kind, leaves) in zip(layers, kinds.items(), strict=True)
    ]


def _site(
    stream: Stream, layer: int, kind: SublayerKind, tree: AddTree, leaves: tuple[Leaf, ...]
) -> FoundSite:
    branches = [own_nodes(tree, leaf) for leaf in leaves]
    outputs = dict.fromkeys(chain.from_iterable(map(stream.own_outputs, branches)))
    if kind == "cross_attention":
        outputs |= _shown_keys(stream, leaves, outputs)
    dying = dying_nodes(stream.index, leaves, outputs)
    return FoundSite(
        layer=layer,
        kind=kind,
        tree=tree,
        leaves=leaves,
        dying=dying,
        caches=own_caches(stream.index, dying, outputs),
        outputs=tuple(outputs),
        obstacle=_obstacle(stream, tree, kind, leaves)
        or _output_obstacle(stream, leaves, outputs)
        or (_published_keys(stream, dying) if kind == "cross_attention" else None),
        branch_input=branch_input(stream.index, stream.dominators, tree, leaves),
    )


def _obstacle(
    stream: Stream, tree: AddTree, kind: SublayerKind, leaves: Sequence[Leaf]
) -> Obstacle | None:
    if len({leaf.value for leaf in leaves}) < len(leaves):
        return Obstacle(tree.add, "the branch joins the sum twice", "joined-twice")
    # An MLP may add in parts that share their work; two attentions that do can't be told apart.
    together = frozenset[ir.Node]()
    if kind == "mlp":
        together = together.union(*(leaf.nodes for leaf in leaves))
    for leaf in leaves:
        reader = stream.foreign_reader(tree, leaf, together)
        if reader is not None:
            what = f"{reader.op_type} {reader.name!r}"
            reason = f"what the branch computes is read elsewhere, by {what}"
            return Obstacle(reader, reason, "read-elsewhere")
        inner = stream.inner_sum(leaf.nodes)
        if inner is not None:
            return Obstacle(inner, "the branch holds a residual sum of its own", "inner-sum")
        end = leaf.value.producer()
        if end is not None and leaf.value.is_graph_output() and _joins_branches(stream, end):
            reason = f"the graph output {leaf.value.name!r} is the sum of several branches"
            return Obstacle(end, reason, "sum-of-branches")
    total = tree.add.outputs[0]
    broadcast = broadcast_reason(tree.skip, total, stream.index.declared)
    if (tree.skip.shape is None or total.shape is None) and stream.may_have_shrunk(tree):
        reason = (
            f"it can't be told whether the skip {tree.skip.name!r} only broadcasts to the "
            "sum's shape; neither shape is declared"
        )
        return Obstacle(tree.add, reason, "unknown-shape")
    return Obstacle(tree.add, broadcast, "broadcast-skip") if broadcast else None


def _joins_branches(stream: Stream, node: ir.Node) -> bool:
    """Whether a node is a sum of parallel branches, which would be told apart if it weren't public.

    Together they might pass for a single sublayer.
    """
    return is_add(node) and stream.joins_branches(node, 0, 1)


def _shown_keys(
    stream: Stream, leaves: Sequence[Leaf], outputs: Collection[ir.Value]
) -> dict[ir.Value, None]:
    """The graph outputs that show keys and values from beside the stream that only this one has.

    They are its cache: a decoder's first step gives them, and the later ones take them.
    """
    index = stream.index
    nodes = frozenset[ir.Node]().union(*(leaf.nodes for leaf in leaves))
    shown = shown_keys(index, nodes, stream.dominators)
    while True:
        dying = dying_nodes(index, leaves, {*outputs, *shown})
        shared = [output for output, origin in shown.items() if not goes(index, origin, dying)]
        if not shared:
            return dict.fromkeys(shown)
        for output in shared:
            del shown[output]


def _output_obstacle(
    stream: Stream, leaves: Sequence[Leaf], outputs: Collection[ir.Value]
) -> Obstacle | None:
    mixed = stream.mixed_output(leaves, outputs)
    node = None if mixed is None else mixed.producer()
    return None if mixed is None or node is None else _shared_output(node, mixed)


def _published_keys(stream: Stream, dying: Set[ir.Node]) -> Obstacle | None:
    """Keys or values from beside the stream that stay, since they are made to be public."""
    index = stream.index
    for node in sorted(dying, key=index.position.__getitem__):
        for value in index.reads(node):
            readers = [reader for reader in index.readers(value) if not is_shape_read(reader)]
            alive = [reader for reader in readers if reader not in dying]
            needed = any(stream.reaches_output(v) for reader in alive for v in reader.outputs)
            producer = value.producer()
            if producer is None or producer in dying or value not in index.varying or needed:
                continue
            if alive or value.is_graph_output():
                reason = (
                    f"its keys or values {value.name!r} come from beside the stream and stay, "
                    "since a graph output is made of them"
                )
                return Obstacle(producer, reason, "public-keys")
    return None


def _shared_output(node: ir.Node, output: ir.Value) -> Obstacle:
    reason = f"the graph output {output.name!r} also holds what other sublayers compute"
    return Obstacle(node, reason, "shared-output")


def _without_shared_outputs(sites: list[FoundSite]) -> list[FoundSite]:
    """Refuses the sites that feed a graph output together, such as one stacked cache."""
    claims = Counter(value for site in sites for value in site.outputs)
    checked = []
    for site in sites:
        shared = [value for value in site.outputs if claims[value] > 1]
        if shared and site.obstacle is None:
            node = shared[0].producer() or site.tree.add
            site = replace(site, obstacle=_shared_output(node, shared[0]))
        checked.append(site)
    return checked


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
    result = [(tree, _branches_by_kind(stream, tree, skipped)) for tree in stream.trees]
    groups = [(tree, kinds) for tree, kinds in result if kinds]
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
