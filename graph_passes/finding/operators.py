"""What single operators do, as far as the search for sublayers has to know."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from graph_passes.finding.dataflow import CONTRACTIONS, inner_nodes, subgraphs

FUSED_ATTENTION = frozenset(
    {"Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedMultiHeadAttention"}
    | {"DecoderMaskedMultiHeadAttention", "PagedAttention", "SparseAttention", "QAttention"}
    | {"DecoderMaskedSelfAttention", "DecoderAttention", "PackedAttention", "QOrderedAttention"}
    | {"LongformerAttention", "QOrderedLongformerAttention", "SparsePagedAttention"}
)
_CONVOLUTIONS = frozenset(
    {"Conv", "ConvInteger", "QLinearConv", "FusedConv", "NhwcConv", "NhwcFusedConv"}
)
_RECURRENCES = frozenset(
    {"Scan", "Loop", "LinearAttention", "CausalConvWithState", "LSTM", "GRU", "RNN"}
)
_ONNX_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})
_NO_WORK = frozenset(
    {"LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization"}
    | {"SkipSimplifiedLayerNormalization", "GroupNorm", "SkipGroupNorm", "EmbedLayerNormalization"}
    | {"QOrderedLayerNormalization", "RMSNormalization", "BiasAdd", "BiasDropout", "GatedAdd"}
    | {"Gelu", "FastGelu", "BiasGelu", "QuickGelu", "QOrderedGelu", "BiasSplitGelu", "SwiGLU"}
    | {"Softmax", "BiasSoftmax", "QLinearSoftmax", "QLinearSigmoid", "QLinearLeakyRelu"}
    | {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QuantizeWithOrder"}
    | {"DequantizeWithOrder", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearWhere"}
    | {"QLinearReduceMean", "ReduceSumInteger", "MulInteger", "RotaryEmbedding"}
    | {"GemmaRotaryEmbedding", "RelativePositionBias", "GatedRelativePositionBias"}
    | {"RemovePadding", "RestorePadding", "GatherBlockQuantized", "GatherND", "ExpandDims"}
    | {"Pad", "Trilu", "Unique", "CropAndResize", "ReorderInput", "ReorderOutput"}
    | {"MemcpyFromHost", "MemcpyToHost"}
)
"""Operators beyond the ONNX standard that multiply no matrices."""
_KNOWN = CONTRACTIONS | FUSED_ATTENTION | _RECURRENCES | _NO_WORK


def is_fused_attention(node: ir.Node) -> bool:
    """Whether a single operator is a whole attention."""
    return node.op_type in FUSED_ATTENTION


def contracts(nodes: Iterable[ir.Node]) -> bool:
    """Whether nodes that make up a branch do any real work, or may do some."""
    return any(
        node.op_type in CONTRACTIONS
        or is_fused_attention(node)
        or is_unknown(node)
        or contracts(inner_nodes(node))
        for node in nodes
    )


def is_unknown(node: ir.Node) -> bool:
    """Whether a node's operator is none that is known here; it may hold a whole sublayer."""
    return node.domain not in _ONNX_DOMAINS and node.op_type not in _KNOWN


def is_opaque(node: ir.Node) -> bool:
    """Whether it can't be told what a node does: it is unknown, or its bodies do the work."""
    if is_unknown(node):
        return True
    hidden = any(True for _ in subgraphs(node)) and node.op_type not in _RECURRENCES
    return hidden and contracts(inner_nodes(node))


def mixes_tokens(node: ir.Node) -> bool:
    """Whether a node brings tokens together without being an attention."""
    if node.op_type in _CONVOLUTIONS:
        return _window(node) != 1
    return node.op_type in _RECURRENCES


def _window(convolution: ir.Node) -> int | None:
    """The largest side of a convolution's window; None where it isn't known."""
    declared = convolution.attributes.get("kernel_shape")
    if declared is not None:
        return max(declared.as_ints(), default=1)
    place = 3 if convolution.op_type == "QLinearConv" else 1
    kernel = convolution.inputs[place] if len(convolution.inputs) > place else None
    if kernel is None or kernel.shape is None:
        return None
    sides = kernel.shape[2:]
    return max((side for side in sides if isinstance(side, int)), default=None)
