"""Keeps a difference in the last place from growing in the graphs that the oracle compares."""

from __future__ import annotations

_ACCURACY, _IN_FLOAT32 = "accuracy_level", 1  # of MatMulNBits and its kin


def with_exact_products(graph: bytes) -> bytes:
    """A serialised graph whose products with packed weights are computed in float32.

    At their usual level of accuracy they quantise their input to int8, so that a difference in
    the last place, as fused sums make it, comes out as a whole step of the quantiser.
    """
    if _ACCURACY.encode() not in graph:
        return graph
    import onnx

    proto = onnx.ModelProto.FromString(graph)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == _ACCURACY and attribute.i:
                attribute.i = _IN_FLOAT32
    data: bytes = proto.SerializeToString()
    return data
