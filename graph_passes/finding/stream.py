"""The residual stream: what every data path from the data input to the output passes through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from functools import cached_property

import onnx_ir as ir

from graph_passes.finding.add_tree import AddTree, Leaf, common_origin, nodes_between, take_apart
from graph_passes.finding.dataflow import (
    CONTRACTIONS,
    Dominators,
    GraphIndex,
    factors,
    has_weight,
    is_add,
    is_scale,
    is_shape_read,
)
from graph_passes.finding.operators import contracts
from graph_passes.finding.sharing import own_nodes, results

_MAX_CANDIDATES = 4


class Stream:
    """The stream from one input to one output, and the sums on it.

    It is walked from the output backwards, from each value to its immediate dominator; at a sum,
    to its skip. What a branch reads beside the stream thus doesn't hide the sublayers before it.
    """

    def __init__(self, index: GraphIndex, source: ir.Value, reaching: set[ir.Value]) -> None:
        self.index = index
        self.source = source
        self.output = index.graph.outputs[0]
        self.trees: list[AddTree] = []
        self._leaps: list[tuple[ir.Value, ir.Value]] = []
        self._approach: dict[ir.Node, list[tuple[ir.Value, ir.Value]]] = {}
        self.dominators = Dominators(index, source)
        self._reaching = reaching
        self._carriers: set[ir.Value] = set()
        if self.descends(self.output):
            self._walk()

    def _walk(self) -> None:
        value = self.output
        steps: list[tuple[ir.Value, ir.Value]] = []
        while value is not self.source:
            self._carriers.add(value)
            node = value.producer()
            assert node is not None
            tree = take_apart(self.index, self.dominators, node)
            if tree is not None:
                self.trees.append(tree)
                steps = self._approach[tree.add] = []
                value = tree.skip
                continue
            above = self.dominators.immediate(value)
            self._leaps.append((above, value))
            steps.append((above, value))
            value = above
        self.trees.reverse()

    def meeting_point(self) -> ir.Node | None:
        """A node at which several streams meet; None for a single stream.

        There, something is added that doesn't descend from the skip, or paths join between
        which residual sums lie that the walk has leaped over.
        """
        for tree in self.trees:
            if tree.strangers:
                return tree.add
        for value, span in self._spans():
            if self.inner_sum(span) is not None:
                return value.producer()
        return None

    def hidden_work(self) -> list[Set[ir.Node]]:
        """The nodes up to each place at which paths join without a sum, if they do work.

        A sublayer may join there in another form than ``x + f(x)``, such as ``a*x + b*f(x)``, or
        many do, where several streams run side by side.
        """
        return [span for _, span in self._spans() if contracts(span)]

    def _spans(self) -> Iterator[tuple[ir.Value, set[ir.Node]]]:
        """The steps of the walk, sums aside, that leap over more than one node."""
        for above, value in self._leaps:
            span = nodes_between(self.index, self.dominators, above, value)
            if len(span) > 1:
                yield value, span

    def may_have_shrunk(self, tree: AddTree) -> bool:
        """Whether an axis may have been lost between the sum before this one and its skip.

        Elsewhere a branch is no larger than the skip, since nothing on the stream takes away.
        """
        return not all(keeps_size(self.index, *step) for step in self._approach[tree.add])

    def misses(self, other: Stream) -> ir.Node | None:
        """A sum on another stream that is not on this one: the two are different models.

        What a state does within one of this stream's branches is no model of its own.
        """
        own = frozenset[ir.Node]().union(*(tree.nodes for tree in self.trees))
        return next((tree.add for tree in other.trees if tree.add not in own), None)

    def inner_sum(self, nodes: Iterable[ir.Node]) -> ir.Node | None:
        """A residual sum, with work on its branch, among ``nodes``; None where there is none."""
        return next((node for node in nodes if is_add(node) and self.sums(node, 0, 1)), None)

    def sums(self, node: ir.Node, *slots: int) -> bool:
        """Whether one of two operands of a node is the skip of the other, with work between."""
        total = node.outputs[0]
        if not self.descends(total) or len(node.inputs) <= max(slots):
            return False
        one, other = (node.inputs[slot] for slot in slots)
        if one is None or other is None:
            return False
        return self._branches_off(node, one, other) or self._branches_off(node, other, one)

    def _branches_off(self, node: ir.Node, skip: ir.Value, branch: ir.Value) -> bool:
        origin = self.dominators.immediate(node.outputs[0])
        if branch is skip or origin is not common_origin(self.dominators, node, skip):
            return False
        return self.descends(branch) and contracts(
            nodes_between(self.index, self.dominators, origin, branch)
        )

    def joins_branches(self, node: ir.Node, *slots: int) -> bool:
        """Whether operands of a node are branches, with work on each, that part before it."""
        operands = [node.inputs[slot] for slot in slots if slot < len(node.inputs)]
        origin = self.dominators.immediate(node.outputs[0])
        return all(
            value is not None
            and self.descends(value)
            and contracts(nodes_between(self.index, self.dominators, origin, value))
            for value in operands
        )

    def carries(self, value: ir.Value) -> bool:
        """Whether a value is on the stream."""
        return value in self._carriers

    def descends(self, value: ir.Value) -> bool:
        """Whether data flows from the source to ``value``."""
        return self.dominators.descends(value)

    def reaches_output(self, value: ir.Value) -> bool:
        """Whether ``value`` has a say in the output, be it by a truth value; shapes excluded."""
        return value in self._reaching

    def foreign_reader(
        self, tree: AddTree, leaf: Leaf, partners: Set[ir.Node] = frozenset()
    ) -> ir.Node | None:
        """A node that uses what the branch computes on the way to the output, but not in it.

        What only prepares the branch, such as a norm, other branches of the sum may read too.
        """
        partners = partners or leaf.nodes
        own = results(self.index, leaf, own_nodes(tree, leaf))
        for node in sorted(leaf.nodes, key=self.index.position.__getitem__):
            closed = partners if node in own else tree.nodes
            for value in node.outputs:
                for reader in self._readers_of(value):
                    joins = value is leaf.value and reader in tree.joints
                    if not joins and self._escapes(reader, closed):
                        return reader
        return None

    def _escapes(self, node: ir.Node, closed: Set[ir.Node]) -> bool:
        """Whether something, be it a truth value, flows from a node to the stream past others."""
        seen: set[ir.Node] = set()
        queue = [node]
        while queue:
            node = queue.pop()
            if node in closed or node in seen or is_shape_read(node):
                continue
            seen.add(node)
            if any(self.carries(value) for value in node.outputs):
                return True
            if any(self.reaches_output(value) for value in node.outputs):
                queue.extend(self._readers([node]))
        return False

    def mixed_output(self, leaves: Iterable[Leaf], outputs: Iterable[ir.Value]) -> ir.Value | None:
        """One of a branch's own outputs into which something else of the stream flows too."""
        nodes = frozenset[ir.Node]().union(*(leaf.nodes for leaf in leaves))
        return next((value for value in outputs if self._is_mixed(value, nodes)), None)

    def _is_mixed(self, output: ir.Value, branch: Set[ir.Node]) -> bool:
        seen = set(branch)
        queue = [output]
        while queue:
            value = queue.pop()
            if value is self.source or self.carries(value):
                return True
            node = value.producer()
            if node is not None and node not in seen and not is_shape_read(node):
                seen.add(node)
                queue.extend(v for v in self.index.reads(node) if v in self._depending)
        return False

    @cached_property
    def _depending(self) -> set[ir.Value]:
        """Every value that depends on the source, be it by a truth value; shapes excluded."""
        values = {self.source}
        for node in self.index.nodes:
            if not is_shape_read(node) and any(v in values for v in self.index.reads(node)):
                values.update(node.outputs)
        return values

    def own_outputs(self, branch: Set[ir.Node]) -> list[ir.Value]:
        """The graph outputs that a branch feeds beside the sum: caches, a router's logits."""
        result = {value: None for node in branch for value in node.outputs}
        seen = set(branch)
        queue = list(branch)
        while queue:
            for reader in self._readers([queue.pop()]):
                if reader in seen or is_shape_read(reader):
                    continue
                seen.add(reader)
                if not any(self.reaches_output(value) for value in reader.outputs):
                    result.update(dict.fromkeys(reader.outputs))
                    queue.append(reader)
        places = self.index.output_place
        return sorted((value for value in result if value in places), key=places.__getitem__)

    def _readers(self, nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
        for node in nodes:
            for value in node.outputs:
                yield from self._readers_of(value)

    def _readers_of(self, value: ir.Value) -> Iterator[ir.Node]:
        if not is_scale(value):  # says nothing without what is scaled
            yield from self.index.readers(value)


def streams(index: GraphIndex) -> list[Stream]:
    """The streams to the first output from each input that may carry the data, the best first.

    The data input is among those that flow into the most weighted contractions, and its stream
    has the most sums: mask, positions and caches join the stream later.
    """
    output = index.graph.outputs[0]
    data = _reaching(output, index.nodes, index.data_reads)
    inputs = [value for value in index.graph.inputs if value in data]
    others = [node for node in index.nodes if not is_shape_read(node)]
    reaching = _reaching(output, others, index.reads)
    reach = dict(zip(inputs, _contractions_reached(index, inputs), strict=True))
    candidates = sorted(inputs, key=lambda value: -reach[value])[:_MAX_CANDIDATES]
    result = [Stream(index, source, reaching) for source in candidates]
    return sorted(result, key=lambda stream: -len(stream.trees))


def _reaching(
    output: ir.Value, nodes: list[ir.Node], reads: Callable[[ir.Node], Iterable[ir.Value]]
) -> set[ir.Value]:
    """Every value from which something flows to ``output`` through what ``nodes`` read."""
    values = {output}
    for node in reversed(nodes):
        if any(value in values for value in node.outputs):
            values.update(reads(node))
    return values


def _contractions_reached(index: GraphIndex, inputs: list[ir.Value]) -> list[int]:
    """How many contractions of an activation with a weight each input flows into."""
    bits = {value: 1 << i for i, value in enumerate(inputs)}
    masks: Counter[int] = Counter()
    for node in index.nodes:
        mask = 0
        for value in index.data_reads(node):
            mask |= bits.get(value, 0)
        if not mask:
            continue
        bits.update(dict.fromkeys(node.outputs, mask))
        if node.op_type in CONTRACTIONS and has_weight(index, node):
            masks[mask] += 1
    return [
        sum(count for mask, count in masks.items() if mask >> i & 1) for i in range(len(inputs))
    ]


_TAKE_AWAY = frozenset(
    {"Slice", "Split", "SplitToSequence", "Compress", "TopK", "ArgMax", "ArgMin", "Unique"}
    | {"GatherElements", "GatherND", "Squeeze", "MaxPool", "AveragePool", "LpPool"}
)
_TAKE_AWAY_PREFIXES = ("Reduce", "Global")


def keeps_size(index: GraphIndex, above: ir.Value, value: ir.Value) -> bool:
    """Whether a path leads from one value to another on which nothing is taken away.

    Beside it, something may: a norm's mean is taken along an axis, but meets the whole again.
    """
    seen = {value}
    queue = [value]
    while queue:
        value = queue.pop()
        if value is above:
            return True
        node = value.producer()
        if node is not None and not _takes_away(index, node):
            operands = [v for v in index.data_reads(node) if v not in seen]
            seen.update(operands)
            queue.extend(operands)
    return False


def _takes_away(index: GraphIndex, node: ir.Node) -> bool:
    if node.op_type == "Gather":
        return node.inputs[0] in index.varying
    if node.op_type in CONTRACTIONS:
        weights = [value for value in factors(node) if value not in index.varying]
        return any(value.shape is not None and 1 in value.shape for value in weights[:1])
    return node.op_type in _TAKE_AWAY or node.op_type.startswith(_TAKE_AWAY_PREFIXES)
