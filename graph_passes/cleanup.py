"""Removes what nothing needs any more: nodes, weights, exporter notes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from graph_passes.finding.dataflow import inner_nodes, subgraphs
from graph_passes.finding.weights import constant_weight, parameters_read


@dataclass
class Swept:
    """How much a sweep took away."""

    nodes: int = 0
    parameters: int = 0

    def add(self, other: Swept) -> None:
        """Counts another sweep in."""
        self.nodes += other.nodes
        self.parameters += other.parameters


def sweep(graph: ir.Graph, roots: Iterable[ir.Node | None]) -> Swept:
    """Removes the dead among ``roots``, then what only they kept alive, and so on."""
    swept = Swept()
    queue = list(roots)
    gone: dict[ir.Node, None] = {}
    while queue:
        node = queue.pop()
        if node is None or node.graph is not graph or node in gone or _is_needed(node):
            continue
        tensor = constant_weight(node)
        swept.parameters += 0 if tensor is None else tensor.size
        operands = _release(node)
        gone[node] = None
        swept.nodes += 1
        for value, parameters in operands.items():
            queue.append(value.producer())
            if drop_unused_weight(graph, value):
                swept.parameters += parameters
    graph.remove(gone, safe=True)  # at once, since each call looks at all graph outputs
    return swept


def _is_needed(node: ir.Node) -> bool:
    return any(value.is_graph_output() or value.uses() for value in node.outputs)


def _release(node: ir.Node) -> dict[ir.Value, int]:
    """Cuts a node and its bodies off from what they read; gives this, with its parameters."""
    operands: dict[ir.Value, int] = {}
    for reader in (node, *inner_nodes(node)):
        for i, value in enumerate(reader.inputs):
            if value is not None:
                operands[value] = max(parameters_read(reader, i), operands.get(value, 0))
        for i in range(len(reader.inputs)):  # only now: one operand tells what another holds
            reader.replace_input_with(i, None)
    return operands


def drop_unused_weight(graph: ir.Graph, value: ir.Value) -> bool:
    """Removes an initializer if nothing reads it.

    Older exporters list weights among the graph's inputs too; there it goes as well.
    """
    name = value.name or ""
    if graph.initializers.get(name) is not value or value.uses() or value.is_graph_output():
        return False
    del graph.initializers[name]
    if value.is_graph_input():
        graph.inputs.remove(value)
    return True


class CleanupPass(ir.passes.InPlacePass):
    """Removes dead nodes, weights and functions, and, unless they are to stay, exporters' notes.

    Notes are metadata and doc strings of nodes, values and tensors: stack traces with local
    paths, for one. The model's own metadata and doc string stay, as do graph outputs, and graph
    inputs that are no weights.
    """

    def __init__(self, *, keep_debug: bool = False) -> None:
        super().__init__()
        self.keep_debug = keep_debug

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cleans the main graph."""
        graph = model.graph
        before = len(graph.initializers)
        swept = sweep(graph, list(graph))
        for value in list(graph.initializers.values()):
            drop_unused_weight(graph, value)
        modified = bool(swept.nodes) or len(graph.initializers) != before
        modified = _drop_uncalled(model) or modified
        if not self.keep_debug:
            modified = _strip_notes(graph) or modified
        return ir.passes.PassResult(model, modified)


def _drop_uncalled(model: ir.Model) -> bool:
    """Removes the local functions if no node calls any; calls among them don't count."""
    if not model.functions or any(
        node.op_identifier() in model.functions for node in model.graph.all_nodes()
    ):
        return False
    model.functions.clear()
    return True


def _strip_notes(graph: ir.Graph) -> bool:
    modified = _strip(graph)
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        modified = _strip(node) or modified
        modified = _strip_attributes(node) or modified
        values.extend(node.outputs)
        for body in subgraphs(node):
            modified = _strip(body) or modified
            values += [*body.inputs, *body.initializers.values()]
    for value in values:
        modified = _strip(value) or modified
        if value.const_value is not None and _has_notes(value.const_value):
            value.const_value = _without_notes(value.const_value)
            modified = True
    return modified


def _strip(item: ir.Graph | ir.Node | ir.Value) -> bool:
    if not item.metadata_props and not item.doc_string:
        return False
    item.metadata_props.clear()
    item.doc_string = None
    return True


def _strip_attributes(node: ir.Node) -> bool:
    """Replaces attributes that carry notes: the objects may be the original model's, too."""
    modified = False
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and _has_notes(attribute.value):
            node.attributes[name] = ir.AttrTensor(name, _without_notes(attribute.value))
            modified = True
        elif attribute.type == ir.AttributeType.TENSORS and any(map(_has_notes, attribute.value)):
            node.attributes[name] = ir.AttrTensors(name, list(map(_without_notes, attribute.value)))
            modified = True
        elif attribute.doc_string:
            node.attributes[name] = ir.Attr(name, attribute.type, attribute.value)
            modified = True
    return modified


def _has_notes(tensor: ir.TensorProtocol) -> bool:
    return bool(tensor.doc_string or tensor.metadata_props)


def _without_notes(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same content without notes; a copy of its own, since models share their tensors."""
    if isinstance(tensor, ir.serde.TensorProtoTensor):
        proto = onnx.TensorProto()
        proto.CopyFrom(tensor.raw)
        proto.ClearField("doc_string")
        proto.ClearField("metadata_props")
        return ir.serde.TensorProtoTensor(proto)
    own = copy.copy(tensor)
    own.doc_string = None
    own._metadata_props = None  # type: ignore[attr-defined]  # clearing would reach the original
    return own
