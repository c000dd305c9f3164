"""What counts as a parameter, in plain and in quantised graphs."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

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
    # A quantised bias is of 32 bits, as the sums that it is added to.
    scaled = any(node.op_type == "DequantizeLinear" and not slot for node, slot in value.uses())
    return tensor.dtype not in _NO_PARAMETERS or scaled


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
    result = (_dtype(value) for value in values)
    return next((dtype for dtype in result if dtype in FLOATS), None)


def width(values: Iterable[ir.Value]) -> int | None:
    """The last dimension of values of one shape; None where none of them tells it."""
    numbers = (_last_dim(value) for value in values)
    return next((size for size in numbers if size is not None), None)


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
            dtypes = [v.dtype for v in node.inputs if v is not None and v.dtype is not None]
            if dtypes:
                return dtypes[0]
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
