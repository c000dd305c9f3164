"""A value's dtype and width where nothing declares them, told by the operators before it."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

_MOST_STEPS = 64
_TYPE_OPERAND = {
    "DequantizeLinear": 1, "CastLike": 1, "Where": 1, "GatherBlockQuantized": 1,
    "EmbedLayerNormalization": 2, "MatMulNBits": 0, "MatMulIntegerToFloat": 2,
    "DynamicQuantizeMatMul": 2,
}  # fmt: skip
"""Which operand has the result's type, where it isn't the first."""
_ONE_TYPE = frozenset(
    {"Add", "Sub", "Mul", "Div", "MatMul", "Gemm", "LayerNormalization", "RMSNormalization"}
    | {"SimplifiedLayerNormalization"}
)
"""Operators of which all operands have the result's type."""
_PRODUCTS = frozenset({"MatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"})
_ELEMENTWISE = _ONE_TYPE - {"MatMul", "Gemm"} | {"Cast", "CastLike", "Identity", "Where", "Pow"}
_QUANTISATION = frozenset({"QuantizeLinear", "DequantizeLinear"})
FLOATS = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)


def float_type(values: Iterable[ir.Value]) -> ir.DataType | None:
    """The floating type of values that have one type; None where none of them tells it."""
    found = (_dtype(value) for value in values)
    return next((dtype for dtype in found if dtype in FLOATS), None)


def width(values: Iterable[ir.Value]) -> int | None:
    """The last dimension of values of one shape; None where none of them tells it."""
    found = (_last_dim(value) for value in values)
    return next((size for size in found if size is not None), None)


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    for _ in range(_MOST_STEPS):
        if value is None or value.dtype is not None:
            break
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Cast":
            return ir.DataType(node.attributes.get_int("to", 0))
        if node.op_type in _ONE_TYPE:
            told = [v.dtype for v in node.inputs if v is not None and v.dtype is not None]
            if told:
                return told[0]
        slot = _TYPE_OPERAND.get(node.op_type, 0)
        value = node.inputs[slot] if slot < len(node.inputs) else None
    return None if value is None else value.dtype


def _last_dim(value: ir.Value | None) -> int | None:
    for _ in range(_MOST_STEPS):
        if value is None:
            return None
        if value.shape is not None and len(value.shape) and isinstance(value.shape[-1], int):
            return value.shape[-1]
        node = value.producer()
        if node is None:
            return None
        if (size := _told_by(node)) is not None:
            return size
        if node.op_type not in _ELEMENTWISE and node.op_type not in _QUANTISATION:
            return None
        value = node.inputs[0]
    return None


def _told_by(node: ir.Node) -> int | None:
    """The last dimension of a node's result, told by its weights."""
    if node.op_type == "MatMulNBits":
        return node.attributes.get_int("N", 0) or None
    if node.op_type in _PRODUCTS:
        return _size(node.inputs[1], -1)
    if node.op_type == "Gemm":
        return _size(node.inputs[1], 0 if node.attributes.get_int("transB", 0) else -1)
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
        table = node.inputs[0]
        is_matrix = table is not None and table.shape is not None and len(table.shape) > 1
        return _size(table, -1) if is_matrix else None
    if node.op_type in _ELEMENTWISE:
        sizes = (_size(value, -1) for value in node.inputs)
        return next((size for size in sizes if size is not None and size > 1), None)
    return None


def _size(value: ir.Value | None, axis: int) -> int | None:
    if value is None or value.shape is None or not len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None
