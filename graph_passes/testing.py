"""The masked oracle: what a pruned graph has to compute, made without the code that prunes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graph_passes.errors import SurgeryError
from graph_passes.fused_norms import BIAS_SLOTS, is_skip_norm
from graph_passes.locate import find_sites
from graph_passes.plan_record import recorded
from graph_passes.types import Deletion, ResidualSite, SublayerRef

_SUMMANDS = 2  # a skip-norm's first operands


def masked_model(model: ir.Model, deletions: Sequence[Deletion]) -> ir.Model:
    """The same graph with the named branches multiplied by zero.

    This is the definition of a right deletion (a branch must be finite: 0 times infinity is
    NaN). It shares only the finder with the code that deletes: every node, input, output and
    weight stays. What the model's record names as deleted earlier is passed over.

    Args:
        model: The model; it is unchanged.
        deletions: What to mask; ``block`` stands for every sublayer of its layer.

    Raises:
        SurgeryError: A named sublayer is not there.
    """
    masked = model.clone()
    sites = [site for site in find_sites(masked) if isinstance(site, ResidualSite)]
    gone = recorded(model)
    values = {value.name: value for node in masked.graph for value in node.outputs}
    for deletion in deletions:
        meant = [site for site in sites if _is_meant(site.ref, deletion)]
        if not meant and not any(_is_meant(ref, deletion) for ref in gone):
            raise SurgeryError(f"The graph has no {deletion.kind} {deletion.layer} to mask.")
        for name in dict.fromkeys(name for site in meant for name in site.branches):
            _multiply_by_zero(masked.graph, values[name])
    return masked


def _is_meant(ref: SublayerRef, deletion: Deletion) -> bool:
    return ref.layer == deletion.layer and deletion.kind in (ref.kind, "block")


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
