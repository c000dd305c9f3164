"""What counts as a parameter, in plain and in quantised graphs."""

from __future__ import annotations

import onnx_ir as ir

_NO_PARAMETERS = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.STRING}
_QUANTISATION: dict[str, tuple[int, ...]] = {
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "MatMulInteger": (2, 3),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
    "DynamicQuantizeMatMul": (2, 3),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "MatMulNBits": (2, 3, 4),
    "GatherBlockQuantized": (2, 3),
    "QMoE": (3, 6, 9, 11, 12, 13),
}
"""Operands that say how a matrix is quantised: scales, zero points, the order of columns."""
_PACKED: dict[str, tuple[tuple[int, ...], str]] = {
    "MatMulNBits": ((1,), "bits"),
    "GatherBlockQuantized": ((0,), "bits"),
    "QMoE": ((2, 5, 8), "expert_weight_bits"),
}
"""Operands that hold several numbers in one byte, and the attribute that tells how many."""
_BITS, _BYTE = 4, 8


def is_weight(value: ir.Value) -> bool:
    """Whether a value holds weights: an initializer, but no shape arithmetic, mask or scalar."""
    tensor = value.const_value
    return (
        value.is_initializer()
        and tensor is not None
        and tensor.size > 1
        and tensor.dtype not in _NO_PARAMETERS
    )


def parameters(value: ir.Value) -> int:
    """How many parameters of the model a value holds; the weight itself is not read."""
    if not is_weight(value) or value.const_value is None:
        return 0
    counts = [parameters_read(reader, slot) for reader, slot in value.uses()]
    return max(counts, default=value.const_value.size)


def parameters_read(reader: ir.Node, slot: int) -> int:
    """How many parameters one operand of a node holds.

    A matrix that is packed in bytes counts by its numbers, not by its bytes. Scales and zero
    points are no parameters.
    """
    value = reader.inputs[slot]
    if value is None or not is_weight(value) or value.const_value is None:
        return 0
    if slot in _QUANTISATION.get(reader.op_type, ()):
        return 0
    size = value.const_value.size
    slots, attribute = _PACKED.get(reader.op_type, ((), ""))
    if slot not in slots or value.const_value.dtype != ir.DataType.UINT8:
        return size
    bits = reader.attributes.get_int(attribute, _BITS)
    return size * _BYTE // bits if 0 < bits <= _BYTE else size


def constant_weight(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node if it is a matrix of numbers: some exporters store weights so.

    Vectors don't count, since there they can't be told from shapes and scales.
    """
    attribute = node.attributes.get("value")
    if node.op_type != "Constant" or attribute is None or attribute.is_ref():
        return None
    tensor = attribute.as_tensor()
    is_matrix = len(tensor.shape) > 1 and tensor.size > 1
    return tensor if is_matrix and tensor.dtype.is_floating_point() else None
