"""Graphs that the finder does not search: why, and what to do instead."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from graph_passes.finding.dataflow import inner_nodes, subgraphs
from graph_passes.finding.operators import contracts
from graph_passes.finding.stream import Stream
from graph_passes.types import Refusal

_FUSED_RESIDUALS = frozenset(
    {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SkipGroupNorm", "BiasAdd"}
    | {"GatedAdd"}
)
_QLINEAR_OPERANDS = (0, 3)
_MAY_FUSE_A_RESIDUAL = {
    "Gemm": (0, 2), "FusedGemm": (0, 2), "FusedConv": (0, 3),
    "NhwcFusedConv": (0, 3), "MatMulNBitsMlp": (0, 1), "MatMulNBitsQkv": (0, 1),
    "QLinearAdd": _QLINEAR_OPERANDS,
}  # fmt: skip
"""Operators that add two of their operands, or what they make of one, and where these stand."""


def graph_refusal(model: ir.Model) -> Refusal | None:
    """Why a graph can't be searched at all; None where it can."""
    graph = model.graph
    if not graph.outputs or not graph.inputs:
        return Refusal(None, None, "", "the graph has no inputs or no outputs", "no-ends")
    for node in graph.all_nodes():
        if node.op_identifier() in model.functions:
            reason = f"the graph calls the local function {node.op_type!r}; inline it first"
            return Refusal(None, None, node.name or "", reason, "local-function")
    return _repeated_name(graph) or _unsound(graph)


def _repeated_name(graph: ir.Graph) -> Refusal | None:
    """Sites are told by their nodes' names, and ONNX Runtime takes no name twice."""
    counts = Counter(node.name for node in graph if node.name)
    for name, count in counts.items():
        if count > 1:
            reason = f"{count} nodes have the name {name!r}; give each its own"
            return Refusal(None, None, name, reason, "repeated-name")
    return None


def _unsound(graph: ir.Graph) -> Refusal | None:
    known: set[ir.Value] = set()
    if refusal := _unsound_nodes(graph, known):
        return refusal
    for value in graph.outputs:
        if value not in known:
            reason = f"nothing gives the graph output {value.name!r}"
            return Refusal(None, None, "", reason, "output-missing")
    return None


def _unsound_nodes(graph: ir.Graph, known: set[ir.Value]) -> Refusal | None:
    """Looks at a graph and its bodies; what they give is added to what is known."""
    known.update(graph.inputs, graph.initializers.values())
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in known:
                reason = (
                    f"it reads {value.name!r}, which nothing before it gives: "
                    "the graph is cyclic, unsorted or broken"
                )
                return Refusal(None, None, node.name or "", reason, "value-missing")
        known.update(node.outputs)
        if refusal := _captured_output(node):
            return refusal
        for body in subgraphs(node):
            if refusal := _unsound_nodes(body, known):
                return refusal
    return None


def _captured_output(node: ir.Node) -> Refusal | None:
    """A body that returns an outer value reads it without any node, which no use records."""
    for body in subgraphs(node):
        for value in body.outputs:
            producer = value.producer()
            if producer is None or producer.graph is not body:
                reason = f"a body of the {node.op_type} returns the outer value {value.name!r}"
                return Refusal(None, None, node.name or "", reason, "captured-output")
    return None


def hidden_part(stream: Stream) -> Refusal | None:
    """A node in which sublayers hide from the finder.

    One hidden sublayer would shift the numbers of those after it, so the whole graph is refused.
    """
    for node in stream.index.nodes:
        on_the_way = any(
            stream.descends(value) and stream.reaches_output(value) for value in node.outputs
        )
        if on_the_way and _fuses_a_residual(stream, node):
            reason = (
                f"the residual sum is fused into {node.op_type}; "
                "cut the graph before it is optimised, and fuse it after that"
            )
            return Refusal(None, None, node.name or "", reason, "fused-residual")
        if any(stream.carries(value) for value in node.outputs) and contracts(inner_nodes(node)):
            return Refusal(None, None, node.name or "", _body_reason(node), "stream-in-body")
    return None


def _fuses_a_residual(stream: Stream, node: ir.Node) -> bool:
    if node.op_type in _FUSED_RESIDUALS:
        return True
    if node.op_type == "QLinearAdd" and stream.joins_branches(node, *_QLINEAR_OPERANDS):
        return True
    slots = _MAY_FUSE_A_RESIDUAL.get(node.op_type)
    return slots is not None and stream.sums(node, *slots)


def _body_reason(node: ir.Node) -> str:
    reason = f"the residual stream runs through {node.op_type}, whose bodies are not searched"
    if node.op_type == "If":
        reason += "; if this is a merged decoder, use the unmerged files"
    return reason
