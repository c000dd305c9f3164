"""Who reads what in a graph, which edges carry activations, and what all paths lead through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from graph_passes.finding.shapes import declared_names

SHAPE_OPS = frozenset({"Shape", "Size"})
_TRUTH_OPS = frozenset(
    {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor"}
    | {"IsNaN", "IsInf", "NonZero"}
)
CONTRACTIONS = frozenset(
    {"MatMul", "Gemm", "Conv", "Einsum", "MatMulInteger", "ConvInteger", "QLinearMatMul"}
    | {"QLinearConv", "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "MatMulInteger16", "QGemm"}
    | {"FusedMatMul", "FusedMatMulActivation", "TransposeMatMul", "FusedGemm", "GemmFastGelu"}
    | {"GemmFloat8", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QOrderedMatMul"}
    | {"FusedConv", "NhwcConv", "NhwcFusedConv", "MoE", "QMoE", "SparseToDenseMatMul"}
)
"""Operators that multiply matrices, in the default domain and in ONNX Runtime's own."""
_SECOND_FACTOR = {"QLinearMatMul": 3, "QLinearConv": 3, "QGemm": 3, "QOrderedMatMul": 2}


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
        self.input_place = {value: i for i, value in enumerate(graph.inputs)}
        self.output_place = {value: i for i, value in enumerate(graph.outputs)}
        self._owner: dict[ir.Node, ir.Node] = {}
        self._captured: dict[ir.Node, list[ir.Value]] = {}
        for node in self.nodes:
            self._index_bodies(node)
        self._data = {node: self._find_data(node) for node in self.nodes}
        self.varying = self._descend(graph.inputs)
        self.declared = declared_names(graph)

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

    def data_reads(self, node: ir.Node) -> tuple[ir.Value, ...]:
        """The values whose contents flow through a node."""
        return self._data[node]

    def _find_data(self, node: ir.Node) -> tuple[ir.Value, ...]:
        if node.domain == "" and (node.op_type in SHAPE_OPS or node.op_type in _TRUTH_OPS):
            return ()
        reads = tuple(value for value in self.reads(node) if not is_scale(value))
        return reads[1:] if node.op_type == "Where" and node.domain == "" else reads

    def readers(self, value: ir.Value) -> Iterator[ir.Node]:
        """The main graph's nodes that read a value, themselves or in a body."""
        for user, _ in value.uses():
            yield self._owner.get(user, user)

    def _descend(self, sources: Iterable[ir.Value]) -> set[ir.Value]:
        """Every value that depends on a graph input, shapes included."""
        result = {value for value in sources if not value.is_initializer()}
        for node in self.nodes:
            if any(value in result for value in self.reads(node)):
                result.update(node.outputs)
        return result


def is_scale(value: ir.Value) -> bool:
    """Whether a value is the scale or zero point that dynamic quantisation has found."""
    node = value.producer()
    return (
        node is not None
        and node.op_type == "DynamicQuantizeLinear"
        and value is not node.outputs[0]
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


def factors(node: ir.Node) -> list[ir.Value]:
    """What a contraction multiplies, without scales, zero points and biases."""
    if node.op_type == "Einsum":
        return [value for value in node.inputs if value is not None]
    places = (0, _SECOND_FACTOR.get(node.op_type, 1))
    inputs = [node.inputs[i] for i in places if i < len(node.inputs)]
    return [value for value in inputs if value is not None]


def has_weight(index: GraphIndex, node: ir.Node) -> bool:
    """Whether an operand of a node does not depend on any graph input."""
    return any(value not in index.varying for value in index.reads(node))


class Dominators:
    """For each value that data flows to from ``source``: the last value on all paths to it.

    The graph is acyclic and in order, so one pass is enough: a value's immediate dominator is
    the nearest common ancestor, in the tree so far, of what its node reads. The walks to it are
    as long as a branch, so the cost is linear in the number of nodes.
    """

    def __init__(
        self, index: GraphIndex, source: ir.Value, nodes: Iterable[ir.Node] | None = None
    ) -> None:
        self.source = source
        self._parent: dict[ir.Value, ir.Value] = {}
        self._depth: dict[ir.Value, int] = {source: 0}
        for node in index.nodes if nodes is None else nodes:
            self._add(index, node)

    def _add(self, index: GraphIndex, node: ir.Node) -> None:
        common: ir.Value | None = None
        for value in index.data_reads(node):
            if value in self._depth:
                common = value if common is None else self._meet(common, value)
        if common is not None:
            for output in node.outputs:
                self._parent[output] = common
                self._depth[output] = self._depth[common] + 1

    def _meet(self, one: ir.Value, other: ir.Value) -> ir.Value:
        while one is not other:
            if self._depth[one] < self._depth[other]:
                one, other = other, one
            one = self._parent[one]
        return one

    def descends(self, value: ir.Value) -> bool:
        """Whether data flows from the source to ``value``."""
        return value in self._depth

    def immediate(self, value: ir.Value) -> ir.Value:
        """The last value before ``value`` on all paths to it; not for the source."""
        return self._parent[value]
