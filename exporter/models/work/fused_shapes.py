"""The shapes that ONNX Runtime's own operators give, which ONNX's inference doesn't know.

Source: the operators' descriptions, ``docs/ContribOperators.md`` of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

Shape = tuple[int, ...]
Shapes = Sequence[Shape | None]
Rule = Callable[[ir.Node, Shapes], Shapes]
"""From a node and the shapes of its inputs to those of its outputs; None for the unknown."""


def matrix_product(node: ir.Node, inputs: Shapes) -> Shapes:
    """As ``MatMul``, with the transpositions of ``FusedMatMul``."""
    first, second = inputs[0], inputs[3 if node.op_type == "QLinearMatMul" else 1]
    if first is None or second is None or min(len(first), len(second)) < 2:
        return [None]
    rows = first[-1 if node.attributes.get_int("transA", 0) else -2]
    columns = second[-2 if node.attributes.get_int("transB", 0) else -1]
    return [(*_broadcast(first[:-2], second[:-2]), rows, columns)]


def _broadcast(first: Shape, second: Shape) -> Shape:
    longest = max(len(first), len(second))
    padded = [(1,) * (longest - len(each)) + each for each in (first, second)]
    return tuple(max(pair) if 0 not in pair else 0 for pair in zip(*padded, strict=True))


def _like_first(node: ir.Node, inputs: Shapes) -> Shapes:
    return [inputs[0]] * len(node.outputs)


def _skip_norm(_node: ir.Node, inputs: Shapes) -> Shapes:
    return [inputs[0], None, None, inputs[0]]  # mean and variance are for training


def _packed_product(node: ir.Node, inputs: Shapes) -> Shapes:
    first = inputs[0]
    return [None if first is None else (*first[:-1], node.attributes.get_int("N", 0))]


def _packed_gather(node: ir.Node, inputs: Shapes) -> Shapes:
    table, indices = inputs[:2]
    if table is None or indices is None:
        return [None]
    axis = node.attributes.get_int("gather_axis", 0) % len(table)
    whole = [*table[:axis], *indices, *table[axis + 1 :]]
    packed = node.inputs[0]
    if packed is not None and packed.dtype == ir.DataType.UINT8:
        whole[-1] *= 8 // node.attributes.get_int("bits", 4)
    return [tuple(whole)]


def _grouped_attention(node: ir.Node, inputs: Shapes) -> Shapes:
    query, past = inputs[0], inputs[3] if len(inputs) > 3 else None
    if query is None:
        return [None]
    heads = node.attributes.get_int("num_heads", 1)
    groups = node.attributes.get_int("kv_num_heads", heads)
    packed = inputs[1] is None  # keys and values stand behind the queries
    size = query[-1] // (heads + 2 * groups if packed else heads)
    before = 0 if past is None else past[2]
    present = (query[0], groups, before + query[1], size)
    return [(*query[:-1], heads * size), present, present]


def _multi_head_attention(node: ir.Node, inputs: Shapes) -> Shapes:
    query = inputs[0]
    value = inputs[2] if len(inputs) > 2 else None
    past = inputs[6] if len(inputs) > 6 else None
    if query is None or value is None:
        return [None]
    heads = node.attributes.get_int("num_heads", 1)
    width = value[-1] if len(value) == 3 else value[1] * value[3]
    length = value[-2] + (0 if past is None else past[2])
    present = (query[0], heads, length, width // heads)
    return [(*query[:-1], width), present, present]


def _attention(_node: ir.Node, inputs: Shapes) -> Shapes:
    tokens, weights = inputs[:2]
    if tokens is None or weights is None:
        return [None]
    return [(*tokens[:-1], weights[-1] // 3)]


def _embedding_norm(_node: ir.Node, inputs: Shapes) -> Shapes:
    ids, table = inputs[0], inputs[2]
    return [None if ids is None or table is None else (*ids, table[-1])]


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("SimplifiedLayerNormalization", "RotaryEmbedding", "GemmaRotaryEmbedding", "Gelu",
         "FastGelu", "BiasGelu", "QuickGelu", "BiasSoftmax", "QLinearSoftmax", "QLinearSigmoid",
         "MoE", "QMoE", "BiasAdd"),
        _like_first,
    ),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), _skip_norm),
    **dict.fromkeys(("MatMulNBits", "MatMulBnb4", "MatMulFpQ4"), _packed_product),
    **dict.fromkeys(
        ("FusedMatMul", "TransposeMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat",
         "MatMulInteger16"),
        matrix_product,
    ),
    "GatherBlockQuantized": _packed_gather,
    "GroupQueryAttention": _grouped_attention,
    "MultiHeadAttention": _multi_head_attention,
    "Attention": _attention,
    "EmbedLayerNormalization": _embedding_norm,
}  # fmt: skip
"""By operator; none of them is in ONNX's own domain."""
