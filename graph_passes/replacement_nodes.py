"""Puts replacements into the graph, before the branches that they are for are taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from graph_passes.finding.shapes import CHANGES_OF_FORM
from graph_passes.finding.weights import float_type
from graph_passes.locate import FoundSite
from graph_passes.replacements import FittedReplacement
from graph_passes.types import SublayerRef

_PREFIX = "depthcut."


@dataclass(frozen=True, eq=False)
class PutIn:
    """A replacement in the graph."""

    ref: SublayerRef
    bias: ir.Node  # the Add of the constant, which is its second operand
    weights: tuple[ir.Value, ...]
    on_stream: bool = False
    displaced: ir.Value | None = None


def spare_input(site: FoundSite) -> FoundSite:
    """The site when a linear map of its input stays: what computes that input doesn't die."""
    kept: set[ir.Node] = set()
    queue: list[ir.Value | str | None] = [site.branch_input]
    while queue:
        value = queue.pop()
        node = value.producer() if isinstance(value, ir.Value) else None
        if node is not None and node in site.dying and node not in kept:
            kept.add(node)
            queue.extend(node.inputs)
    outputs = tuple(value for value in site.outputs if value.producer() not in kept)
    return replace(site, dying=site.dying - kept, outputs=outputs)


def put_in(
    graph: ir.Graph, sites: Sequence[FoundSite], fitted: Mapping[SublayerRef, FittedReplacement]
) -> dict[SublayerRef, PutIn]:
    """Puts replacements beside the branches that are about to go.

    A linear map takes the place of one of the branch's operands in the sum, so that a norm that
    was fused with the sum can be so again. A bias stands behind the sum, as does a linear map
    where the sum is taken in parts of which one is quantised or of another type.
    """
    writer = _Writer(graph)
    replaced = [site for site in sites if site.ref in fitted]
    # From the last on: what an earlier one adds to the stream, a later one's input must hold.
    put = [_put_in(writer, site, fitted[site.ref]) for site in reversed(replaced)]
    return {item.ref: item for item in reversed(put)}


class _Writer:
    """Makes nodes and weights with names that the graph doesn't have yet."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        names: set[str | None] = set(graph.initializers)
        for node in graph.all_nodes():
            names.update((node.name, *(value.name for value in node.outputs)))
        self._taken = {name for name in names if name and name.startswith(_PREFIX)}

    def free_name(self, name: str) -> str:
        """The name, with a number behind it where it is taken."""
        free, number = name, 1
        while free in self._taken:
            free, number = f"{name}.{number}", number + 1
        self._taken.add(free)
        return free

    def node(
        self, op_type: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, like: ir.Value
    ) -> ir.Node:
        """A node, not yet in the graph, of which the result has another value's shape."""
        to = [ir.AttrInt64("to", dtype.value)] if op_type == "Cast" else []
        node = ir.Node("", op_type, inputs, to, name=self.free_name(name))
        output = node.outputs[0]
        output.name, output.type = node.name, ir.TensorType(dtype)
        output.shape = None if like.shape is None else like.shape.copy()
        return node

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A weight in the graph."""
        tensor.name = name = self.free_name(name)
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape)
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value


def _put_in(writer: _Writer, site: FoundSite, fitted: FittedReplacement) -> PutIn:
    prefix = f"{_PREFIX}{site.kind}.{site.layer}"
    bias = writer.initializer(f"{prefix}.bias", fitted.bias)
    if fitted.weight is None:
        add = _behind_sum(writer, site.tree.add, bias, f"{prefix}.add")
        return PutIn(site.ref, add, (bias,), on_stream=True)
    weight = writer.initializer(f"{prefix}.weight", fitted.weight)
    nodes = _linear_map(writer, site, weight, bias, prefix)
    made = nodes[-1].outputs[0]
    leaf = site.leaves[0]
    if _can_take_its_place(site):
        writer.graph.insert_before(leaf.joint, nodes)
        leaf.joint.replace_input_with(leaf.joint.inputs.index(leaf.value), made)
        return PutIn(site.ref, nodes[-1], (weight, bias), displaced=leaf.value)
    joint = _behind_sum(writer, site.tree.add, made, f"{prefix}.sum")
    writer.graph.insert_before(joint, nodes)
    return PutIn(site.ref, nodes[-1], (weight, bias))


def _can_take_its_place(site: FoundSite) -> bool:
    """Whether a map of the site's input may stand where its first operand does.

    An inner sum may be rounded in another way than the stream, or stand before the skip.
    """
    if any(node.op_type in CHANGES_OF_FORM for node in site.tree.joints):
        return False
    return site.branch_input is not site.tree.skip or site.leaves[0].joint is site.tree.add


def _linear_map(
    writer: _Writer, site: FoundSite, weight: ir.Value, bias: ir.Value, prefix: str
) -> list[ir.Node]:
    """A product and an Add, and a Cast before them where the input is of another type."""
    value, dtype, total = site.branch_input, bias.dtype, site.tree.add.outputs[0]
    assert isinstance(value, ir.Value)
    assert dtype is not None
    nodes = []
    if float_type([value]) not in (None, dtype):
        nodes.append(writer.node("Cast", [value], f"{prefix}.cast", dtype, value))
        value = nodes[-1].outputs[0]
    nodes.append(writer.node("MatMul", [value, weight], f"{prefix}.matmul", dtype, total))
    result = nodes[-1].outputs[0]
    return [*nodes, writer.node("Add", [result, bias], f"{prefix}.add", dtype, total)]


def _behind_sum(writer: _Writer, total: ir.Node, addend: ir.Value, name: str) -> ir.Node:
    """Adds something to a sum, for all who read it, under its public name."""
    value, dtype = total.outputs[0], addend.dtype
    assert dtype is not None
    add = writer.node("Add", [value, addend], name, dtype, value)
    result = add.outputs[0]
    if value.is_graph_output():
        value.name, result.name = result.name, value.name
    value.replace_all_uses_with(result, replace_graph_outputs=True)
    add.replace_input_with(0, value)
    writer.graph.insert_after(total, add)
    return add
