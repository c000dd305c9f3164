"""Makes one operator of a residual sum and the norm behind it."""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.finding.dataflow import is_add
from graph_passes.finding.shapes import dims
from graph_passes.fused_norms import BIAS_SLOTS, DOMAIN, take_over, without_trailing_gaps

_SUM = 3
_FUSED = {
    "LayerNormalization": "SkipLayerNormalization",
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
    "SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization",
}
_EPSILON = 1e-5  # the norms' default
_LAST_AXIS = -1


def fuse_skip_norms(graph: ir.Graph) -> int:
    """Fuses each sum of two values of one shape with the first norm that reads it."""
    return sum(_fuse(graph, node) for node in list(graph) if node.op_type in _FUSED)


def _fuse(graph: ir.Graph, norm: ir.Node) -> bool:
    stream = norm.inputs[0]
    add = stream.producer() if stream is not None else None
    if add is None or add.graph is not graph or not is_add(add) or not _fits(norm, add):
        return False
    operands, bias = _without_bias(add)
    op_type = _FUSED[norm.op_type]
    weights = [*norm.inputs[1:], *[None] * (BIAS_SLOTS[op_type] - 1 - len(norm.inputs))]
    read = add.outputs[0].is_graph_output() or len(list(add.outputs[0].uses())) > 1
    fused = ir.Node(
        DOMAIN,
        op_type,
        without_trailing_gaps([*operands, *weights, *bias]),
        [ir.AttrFloat32("epsilon", norm.attributes.get_float("epsilon", _EPSILON))],
        num_outputs=_SUM + 1 if read else 1,
        name=norm.name,
        metadata_props=dict(norm.metadata_props),
    )
    for unused in fused.outputs[1:_SUM]:
        unused.name = ""
    graph.insert_before(norm, fused)
    take_over(fused.outputs[0], norm.outputs[0])
    graph.remove(norm, safe=True)
    if read:
        take_over(fused.outputs[_SUM], add.outputs[0])
    graph.remove(add, safe=True)
    return True


def _fits(norm: ir.Node, add: ir.Node) -> bool:
    """Whether the norm is one over the last dimension, and the sum one of equal shapes."""
    if norm.domain not in ("", DOMAIN) or any(value.uses() for value in norm.outputs[1:]):
        return False
    one, other = (None if value is None else dims(value) for value in add.inputs)
    if one is None or one != other or None in one or len(one) not in (2, 3):
        return False
    axis = norm.attributes.get_int("axis", _LAST_AXIS)
    weights = norm.inputs[1:]
    whole = all(value is not None and dims(value) == one[-1:] for value in weights)
    return whole and bool(weights) and axis in (_LAST_AXIS, len(one) - 1)


def _without_bias(add: ir.Node) -> tuple[list[ir.Value | None], list[ir.Value]]:
    """A sum's operands, and the constant that one of them ends with, if no one else reads it."""
    operands = list(add.inputs)
    for slot, operand in enumerate(operands):
        inner = operand.producer() if operand is not None else None
        if inner is None or operand is None or not is_add(inner) or len(list(operand.uses())) > 1:
            continue
        for value, bias in (inner.inputs, inner.inputs[::-1]):
            if value is None or bias is None or not bias.is_initializer():
                continue
            width = dims(operand)
            if width is not None and dims(value) == width and dims(bias) == width[-1:]:
                operands[slot] = value
                return operands, [bias]
    return operands, []
