"""What counts as a parameter, in plain and in quantised graphs."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

_NO_PARAMETERS = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.STRING}
_NO_WEIGHTS: dict[str, tuple[int, ...]] = {
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "MatMulInteger": (2, 3),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
    "DynamicQuantizeMatMul": (2, 3),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "MatMulNBits": (2, 3, 4),
    "MatMulBnb4": (2,),
    "GatherBlockQuantized": (2, 3),
    "QMoE": (3, 6, 9, 11, 12, 13),
    "GroupQueryAttention": (7, 8),
}
"""Operands that say how a matrix is quantised: scales, zero points, the order of columns. Beside
them the angles of positions, which a fused operator reads from a table and others compute."""
_PACKED: dict[str, tuple[tuple[int, ...], str]] = {
    "GatherBlockQuantized": ((0,), "bits"),
    "QMoE": ((2, 5, 8), "expert_weight_bits"),
}
"""Operands that hold several numbers in one byte, and the attribute that tells how many."""
_PACKED_PRODUCTS = {"MatMulNBits", "MatMulBnb4"}
"""Their second operand holds ``K`` times ``N`` numbers, and what fills its last blocks."""
BLOCK_SUMS = "/block_sums"
"""How the name of a product ends that sums the blocks of another's input. The other reads its
input followed by these, and has further rows for them, which say how its matrix is quantised."""
_BITS, _BYTE = 4, 8


def is_weight(value: ir.Value) -> bool:
    """Whether a value holds weights: an initializer, but no shape arithmetic, mask or scalar."""
    tensor = value.const_value
    if not value.is_initializer() or tensor is None or tensor.size < 2:
        return False
    return tensor.dtype not in _NO_PARAMETERS or _is_quantised_bias(value)


def _is_quantised_bias(value: ir.Value) -> bool:
    """Of 32 bits, as the sums that it is added to."""
    return any(node.op_type == "DequantizeLinear" and not slot for node, slot in value.uses())


def parameters(value: ir.Value) -> int:
    """How many parameters of the model a value holds; the weight itself is not read."""
    if not is_weight(value) or value.const_value is None:
        return 0
    counts = [parameters_read(reader, slot) for reader, slot in value.uses()]
    return max(counts, default=value.const_value.size)


def parameters_read(reader: ir.Node, slot: int) -> int:
    """How many parameters one operand of a node holds.

    A matrix that is packed in bytes counts by its numbers, not by its bytes. Scales, zero points
    and tables of angles are no parameters.
    """
    value = reader.inputs[slot]
    if value is None or not is_weight(value) or value.const_value is None:
        return 0
    if slot in _NO_WEIGHTS.get(reader.op_type, ()):
        return 0
    size = value.const_value.size
    if slot == 1 and reader.op_type in _PACKED_PRODUCTS:
        return _depth(reader) * reader.attributes.get_int("N", 0)
    slots, attribute = _PACKED.get(reader.op_type, ((), ""))
    if slot not in slots or value.const_value.dtype != ir.DataType.UINT8:
        return size
    bits = reader.attributes.get_int(attribute, _BITS)
    return size * _BYTE // bits if 0 < bits <= _BYTE else size


def _depth(product: ir.Node) -> int:
    """How many rows of a packed matrix are weights."""
    if (product.name or "").endswith(BLOCK_SUMS):
        return 0
    joined = product.inputs[0].producer() if product.inputs[0] is not None else None
    if joined is not None and joined.op_type == "Concat":
        for part in joined.inputs:
            sums = part.producer() if part is not None else None
            if sums is not None and (sums.name or "").endswith(BLOCK_SUMS):
                return sums.attributes.get_int("K", 0)
    return product.attributes.get_int("K", 0)


def place(tensor: ir.TensorProtocol) -> Hashable:
    """What two tensors have in common that are the same bytes, read in two shapes."""
    if isinstance(tensor, ir.ExternalTensor):
        return tensor.path, tensor.offset
    return id(tensor)


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
