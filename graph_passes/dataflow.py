"""Which values the residual stream consists of: the dominators between an input and the output.

A value lies on the stream when every data path from the model's data input to its first output
passes through it. Paths are counted rather than walked: each edge gets a random weight, a path
weighs the product of its edges, and ``v`` dominates exactly when ``paths into v * paths out of
v`` equals all paths. Counting is done modulo the prime 2^61 - 1, so a wrong "yes" has a chance
of about 2^-60; a wrong "no" can't happen. The cost is linear in the number of edges.

Edges that carry no activations don't count: what only asks for a shape, and truth values.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping

import onnx_ir as ir

PRIME = (1 << 61) - 1
_SEED = 0x5EED
_MAX_CANDIDATES = 8

SHAPE_OPS = frozenset({"Shape", "Size"})
_TRUTH_OPS = frozenset(
    {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor"}
    | {"IsNaN", "IsInf", "NonZero"}
)
CONTRACTIONS = frozenset(
    {"MatMul", "Gemm", "Conv", "Einsum", "MatMulInteger", "MatMulNBits", "FusedMatMul"}
)


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The bodies of an If, Loop or Scan."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def inner_nodes(node: ir.Node) -> Iterator[ir.Node]:
    """All nodes of a node's bodies, nested ones included."""
    for graph in subgraphs(node):
        for inner in graph:
            yield inner
            yield from inner_nodes(inner)


def is_shape_read(node: ir.Node) -> bool:
    """Whether a node reads only its operand's shape."""
    return node.op_type in SHAPE_OPS and node.domain == ""


class GraphIndex:
    """The main graph's nodes in order, with what each one reads and who reads each value.

    Values that a body of an If or Loop takes from outside count as read by the outer node.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = list(graph)
        self.position: dict[ir.Node, int] = {node: i for i, node in enumerate(self.nodes)}
        self._owner: dict[ir.Node, ir.Node] = {}
        self._captured: dict[ir.Node, list[ir.Value]] = {}
        for node in self.nodes:
            self._index_bodies(node)
        self.varying = self._descend(graph.inputs)

    def _index_bodies(self, node: ir.Node) -> None:
        captured: dict[ir.Value, None] = {}
        for inner in inner_nodes(node):
            self._owner[inner] = node
            for value in inner.inputs:
                if value is not None and self.is_outer(value):
                    captured[value] = None
        if captured:
            self._captured[node] = list(captured)

    def is_outer(self, value: ir.Value) -> bool:
        """Whether a value belongs to the main graph."""
        producer = value.producer()
        if producer is not None:
            return producer in self.position
        return value.graph is self.graph

    def reads(self, node: ir.Node) -> Iterator[ir.Value]:
        """Every value that a node reads, one entry per operand."""
        for value in node.inputs:
            if value is not None:
                yield value
        yield from self._captured.get(node, ())

    def data_reads(self, node: ir.Node) -> Iterator[ir.Value]:
        """The values whose contents flow through a node."""
        if node.domain == "" and (node.op_type in SHAPE_OPS or node.op_type in _TRUTH_OPS):
            return
        if node.domain == "" and node.op_type == "Where":
            yield from (value for value in node.inputs[1:] if value is not None)
            return
        yield from self.reads(node)

    def readers(self, value: ir.Value) -> Iterator[ir.Node]:
        """The main graph's nodes that read a value, themselves or in a body."""
        for user, _ in value.uses():
            yield self._owner.get(user, user)

    def _descend(self, sources: Iterable[ir.Value]) -> set[ir.Value]:
        """Every value that depends on a graph input, shapes included."""
        found = {value for value in sources if not value.is_initializer()}
        for node in self.nodes:
            if any(value in found for value in self.reads(node)):
                found.update(node.outputs)
        return found


class Stream:
    """The residual stream from one input to one output.

    Attributes:
        index: The graph.
        source: The data input that the stream starts from.
        output: The output that it ends in.
    """

    def __init__(
        self, index: GraphIndex, source: ir.Value, output: ir.Value, into: dict[ir.Value, int],
        out_of: dict[ir.Value, int],
    ) -> None:  # fmt: skip
        self.index = index
        self.source = source
        self.output = output
        self._into = into
        self._out_of = out_of
        self._total = into.get(output, 0)

    def carries(self, value: ir.Value) -> bool:
        """Whether every data path passes through ``value``."""
        into = self._into.get(value, 0)
        return into != 0 and into * self._out_of.get(value, 0) % PRIME == self._total

    def descends(self, value: ir.Value) -> bool:
        """Whether data flows from the source to ``value``."""
        return value in self._into

    def reaches_output(self, value: ir.Value) -> bool:
        """Whether data flows from ``value`` to the output."""
        return value in self._out_of

    def sums(self) -> list[ir.Node]:
        """The Adds of two activations whose sum lies on the stream, in graph order."""
        return [node for node in self.index.nodes if self._is_sum(node)]

    def _is_sum(self, node: ir.Node) -> bool:
        return (
            is_add(node)
            and all(value in self.index.varying for value in node.inputs)
            and self.carries(node.outputs[0])
        )


def is_add(node: ir.Node | None) -> bool:
    """Whether a node is a plain Add of two operands."""
    return (
        node is not None
        and node.op_type == "Add"
        and node.domain == ""
        and len(node.inputs) == 2
        and None not in node.inputs
    )


def candidate_streams(index: GraphIndex) -> Iterator[Stream]:
    """The streams to the first output from each input that may carry the data.

    The data input is among those that flow into the most weighted contractions. A caller tells
    them apart by what their streams look like: the mask and the caches join every attention
    anew, so hardly anything lies on all of their paths.
    """
    output = index.graph.outputs[0]
    weights = _edge_weights(index)
    out_of = _paths_out(index, output, weights)
    for source in _candidates(index, out_of):
        yield Stream(index, source, output, _paths_into(index, source, weights), out_of)


def _edge_weights(index: GraphIndex) -> dict[ir.Node, list[int]]:
    dice = random.Random(_SEED)  # noqa: S311 - not a secret: the same on every run
    return {
        node: [dice.randrange(1, PRIME) for _ in index.data_reads(node)] for node in index.nodes
    }


def _paths_into(
    index: GraphIndex, source: ir.Value, weights: Mapping[ir.Node, list[int]]
) -> dict[ir.Value, int]:
    """The weighted number of paths from ``source`` to each value that it flows to."""
    into = {source: 1}
    for node in index.nodes:
        count = 0
        for value, weight in zip(index.data_reads(node), weights[node], strict=True):
            count += into.get(value, 0) * weight
        if count:
            into.update(dict.fromkeys(node.outputs, count % PRIME))
    return into


def _paths_out(
    index: GraphIndex, output: ir.Value, weights: Mapping[ir.Node, list[int]]
) -> dict[ir.Value, int]:
    """The weighted number of paths from each value to ``output``."""
    out_of = {output: 1}
    for node in reversed(index.nodes):
        count = sum(out_of.get(value, 0) for value in node.outputs) % PRIME
        if not count:
            continue
        for value, weight in zip(index.data_reads(node), weights[node], strict=True):
            out_of[value] = (out_of.get(value, 0) + count * weight) % PRIME
    return out_of


def _candidates(index: GraphIndex, out_of: Mapping[ir.Value, int]) -> list[ir.Value]:
    """The few inputs that flow into the most contractions with a weight."""
    inputs = [value for value in index.graph.inputs if value in out_of]
    reach = dict(zip(inputs, _contractions_reached(index, inputs), strict=True))
    return sorted(inputs, key=lambda value: -reach[value])[:_MAX_CANDIDATES]


def _contractions_reached(index: GraphIndex, inputs: list[ir.Value]) -> list[int]:
    """How many contractions of an activation with a weight each input flows into."""
    bits = {value: 1 << i for i, value in enumerate(inputs)}
    reached = [0] * len(inputs)
    for node in index.nodes:
        mask = 0
        for value in index.data_reads(node):
            mask |= bits.get(value, 0)
        if not mask:
            continue
        bits.update(dict.fromkeys(node.outputs, mask))
        if node.op_type in CONTRACTIONS and has_weight(index, node):
            for i in range(len(inputs)):
                reached[i] += mask >> i & 1
    return reached


def has_weight(index: GraphIndex, node: ir.Node) -> bool:
    """Whether an operand of a node does not depend on any graph input."""
    return any(value not in index.varying for value in index.reads(node))
