"""The masked oracle: what a pruned graph has to compute, made without the code that prunes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import onnx_ir as ir

from graph_passes.errors import SurgeryError
from graph_passes.fused_norms import BIAS_SLOTS, is_skip_norm
from graph_passes.locate import find_sites
from graph_passes.plan_record import recorded
from graph_passes.replacements import Numbers, ReplacementTensors
from graph_passes.types import Deletion, Replacement, ResidualSite, SublayerRef

_SUMMANDS = 2  # a skip-norm's first operands
_CAST_LIKE_SINCE = 15  # the opset


def masked_model(
    model: ir.Model,
    deletions: Sequence[Deletion],
    replacements: Mapping[SublayerRef, ReplacementTensors] | None = None,
) -> ir.Model:
    """The same graph with the named branches multiplied by zero, plus their replacements.

    This is the definition of a right deletion (a branch must be finite: 0 times infinity is
    NaN). It shares only the finder with the code that deletes: every node, input, output and
    weight stays. What the model's record names as deleted earlier is passed over.

    Args:
        model: The model; it is unchanged.
        deletions: What to mask; ``block`` stands for every sublayer of its layer.
        replacements: The numbers for those that name a replacement.

    Raises:
        SurgeryError: A named sublayer is not there, or its numbers are not.
    """
    masked = model.clone()
    sites = [site for site in find_sites(masked) if isinstance(site, ResidualSite)]
    gone = recorded(model)
    values = {value.name: value for node in masked.graph for value in node.outputs}
    wanted: dict[SublayerRef, Replacement] = {}
    for deletion in deletions:
        meant = [site.ref for site in sites if deletion.names(site.ref)]
        if not meant and not any(deletion.names(ref) for ref in gone):
            raise SurgeryError(
                f"The graph has no {deletion.kind} {deletion.layer} to mask.",
                code="sublayer-missing",
            )
        wanted.update(dict.fromkeys(meant, deletion.replacement))
    chosen = [site for site in sites if site.ref in wanted]
    added = [
        _Addition(masked.graph, site, wanted[site.ref], (replacements or {}).get(site.ref))
        for site in chosen
        if wanted[site.ref] != "none"
    ]
    for name in dict.fromkeys(name for site in chosen for name in site.branches):
        _multiply_by_zero(masked.graph, values[name])
    for addition in added:
        addition.join()
    return masked


def _multiply_by_zero(graph: ir.Graph, branch: ir.Value) -> None:
    """Puts ``branch * 0`` in the branch's place in the sum that it joins, with its bias."""
    for reader, slot in list(branch.uses()):
        if reader.op_type == "Add" and reader.domain == "":
            _mask_operand(graph, reader, slot)
        elif is_skip_norm(reader) and slot < _SUMMANDS:
            _mask_operand(graph, reader, slot)
            bias = BIAS_SLOTS[reader.op_type]
            if len(reader.inputs) > bias and reader.inputs[bias] is not None:
                _mask_operand(graph, reader, bias)


def _mask_operand(graph: ir.Graph, reader: ir.Node, slot: int) -> None:
    value = reader.inputs[slot]
    assert value is not None
    # Not a constant zero, since a branch need not have a declared type.
    zero = ir.Node("", "Sub", [value, value])
    masked = ir.Node("", "Mul", [value, zero.outputs[0]])
    masked.outputs[0].type, masked.outputs[0].shape = value.type, value.shape
    graph.insert_before(reader, [zero, masked])
    reader.replace_input_with(slot, masked.outputs[0])


class _Addition:
    """What is added to a sum in a masked branch's place, by other operators than the surgery's.

    The input of a linear map is looked up before any sum changes; its reader then follows it.
    """

    def __init__(
        self,
        graph: ir.Graph,
        site: ResidualSite,
        kind: Replacement,
        given: ReplacementTensors | None,
    ) -> None:
        if given is None or (kind == "linear" and given.weight is None):
            raise SurgeryError(
                f"There are no numbers to replace {site.ref} by.", code="numbers-missing"
            )
        self._graph = graph
        self._joint = next(node for node in graph if node.name == site.residual_add)
        self._bias = self._constant(site, given.bias)
        self._weight = self._input = None
        if kind == "linear" and given.weight is not None:
            self._weight = self._constant(site, given.weight)
            self._input = self._reader(site)

    def join(self) -> None:
        """Adds it behind the sum, or to one of its operands where a norm is fused with it."""
        joint = self._joint
        if is_skip_norm(joint):
            operand = joint.inputs[0]
            assert operand is not None
            total = ir.Node("", "Add", [operand, operand])
            nodes = self._addend(total)
            self._graph.insert_before(joint, nodes)
            joint.replace_input_with(0, total.outputs[0])
            return
        operand = joint.outputs[0]
        total = ir.Node("", "Add", [operand, operand])
        result = total.outputs[0]
        if operand.type is not None:
            result.type, result.shape = operand.type, operand.shape
        if operand.is_graph_output():
            operand.name, result.name = f"{operand.name}.masked", operand.name
        operand.replace_all_uses_with(result, replace_graph_outputs=True)
        total.replace_input_with(0, operand)
        self._graph.insert_after(joint, self._addend(total))

    def _addend(self, total: ir.Node) -> list[ir.Node]:
        """The nodes that make a sum's second operand, then the sum."""
        like = total.inputs[0]
        assert like is not None
        bias = self._cast(self._bias, like)
        total.replace_input_with(1, bias.outputs[0])
        if self._input is None or self._weight is None:
            return [bias, total]
        read, weight = self._cast(self._input, like), self._cast(self._weight, like)
        turned = ir.Node("", "Transpose", weight.outputs, [ir.AttrInt64s("perm", [1, 0])])
        product = ir.Node("", "MatMul", [read.outputs[0], turned.outputs[0]])
        nodes = [bias, read, weight, turned, product]
        addend = ir.Node("", "Sum", [nodes[-1].outputs[0], bias.outputs[0]])
        total.replace_input_with(1, addend.outputs[0])
        return [*nodes, addend, total]

    def _cast(self, value: ir.Value, like: ir.Value) -> ir.Node:
        if self._graph.opset_imports.get("", 0) >= _CAST_LIKE_SINCE:
            return ir.Node("", "CastLike", [value, like])
        to = (like.dtype or ir.DataType.FLOAT).value
        return ir.Node("", "Cast", [value], [ir.AttrInt64("to", to)])

    def _reader(self, site: ResidualSite) -> ir.Value:
        known = chain(self._graph.inputs, *(node.outputs for node in self._graph))
        source = next((v for v in known if v.name == site.branch_input), None)
        if source is None:
            raise SurgeryError(f"No value is the input of {site.ref}.")
        reader, producer = ir.Node("", "Identity", [source]), source.producer()
        if producer is not None:
            self._graph.insert_after(producer, reader)
        else:
            self._graph.insert_before(self._graph[0], reader)
        return reader.outputs[0]

    def _constant(self, site: ResidualSite, numbers: Numbers) -> ir.Value:
        tensor = ir.tensor(numbers) if isinstance(numbers, np.ndarray) else numbers
        shape = ir.Shape(tensor.shape.numpy())
        name = f"oracle.{site.kind}.{site.layer}.{len(self._graph.initializers)}"
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape)
        value.const_value = tensor
        self._graph.register_initializer(value)
        return value
