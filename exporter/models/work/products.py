"""How many multiplications a node of known shapes takes."""

from __future__ import annotations

import math

import onnx_ir as ir

from exporter.models.work.fused_shapes import Shape
from exporter.models.work.run_shapes import RunShapes
from graph_passes.finding.dataflow import CONTRACTIONS, factors
from graph_passes.finding.operators import is_fused_attention, is_opaque, mixes_tokens

_PACKED = frozenset({"MatMulNBits", "MatMulBnb4", "MatMulFpQ4"})
_BY_DATA = frozenset({"MoE", "QMoE"})
"""What they compute depends on the tokens."""
_PAST_KEYS = {"GroupQueryAttention": 3, "MultiHeadAttention": 6, "Attention": 4}
"""Where a fused attention reads the keys of its cache."""


def multiplications(node: ir.Node, shapes: RunShapes) -> int | None:
    """Of matrix products; 0 for what has none, None where it can't be told.

    An attention counts all pairs of a query and a key, masked ones too, but for those outside of
    the window that the operator is told.
    """
    if node.op_type in _BY_DATA:
        return None
    try:
        if is_fused_attention(node):
            return _of_attention(node, shapes)
        if node.op_type == "ConvTranspose":
            return _of_transposed(node, shapes)
        if node.op_type in CONTRACTIONS:
            return _of_product(node, shapes)
    except (IndexError, KeyError, TypeError, ValueError):
        return None  # operands or attributes that the operator doesn't have
    return None if is_opaque(node) or mixes_tokens(node) else 0


def _of_product(node: ir.Node, shapes: RunShapes) -> int | None:
    first = shapes.of(node.inputs[0])
    if node.op_type in _PACKED:
        columns = node.attributes.get_int("N", 0)
        return None if first is None else math.prod(first) * columns
    if node.op_type == "Einsum":
        return _of_einsum(node, [shapes.of(value) for value in node.inputs])
    out = shapes.of(node.outputs[0])
    if first is None or out is None:
        return None
    if "Conv" in node.op_type:
        kernel = shapes.of(factors(node)[1])
        return None if kernel is None else math.prod(out) * math.prod(kernel[1:])
    depth = first[-2] if node.attributes.get_int("transA", 0) else first[-1]
    return math.prod(out) * depth


def _of_transposed(node: ir.Node, shapes: RunShapes) -> int | None:
    first, kernel = (shapes.of(value) for value in node.inputs[:2])
    if first is None or kernel is None:
        return None
    return math.prod(first) * math.prod(kernel[1:])


def _of_einsum(node: ir.Node, inputs: list[Shape | None]) -> int | None:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    terms = equation.partition("->")[0].split(",")
    if "." in equation or None in inputs:
        return None
    sizes = {
        letter: size
        for term, shape in zip(terms, inputs, strict=True)
        for letter, size in zip(term, shape or (), strict=True)
    }
    return math.prod(sizes.values())


def _of_attention(node: ir.Node, shapes: RunShapes) -> int | None:
    slot, out = _PAST_KEYS.get(node.op_type), shapes.of(node.outputs[0])
    given = [shapes.of(value) for value in node.inputs]
    if slot is None or out is None or given[0] is None:
        return None
    projecting = node.op_type == "Attention" and node.domain != ""
    query = out if projecting or len(given) < 2 or given[1] is None else given[0]
    keys = query if projecting or len(given) < 2 else given[1] or query
    past = given[slot] if len(given) > slot else None
    total = keys[-2] + (0 if past is None else past[-2])
    window = node.attributes.get_int("local_window_size", -1)
    seen = min(total, window) if window > 0 else total
    projected = math.prod(given[0]) * (given[1] or (0,))[-1] if projecting else 0
    return seen * (math.prod(query) + math.prod(out)) + projected
