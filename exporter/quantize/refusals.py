"""What is refused before any work: graphs that are quantised, and what the runtime can't run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.artifacts.comparison import QUANTIZATION_KEY
from exporter.errors import QuantizationError
from exporter.quantize.products import Products
from exporter.quantize.settings import QuantizeSettings

_QUANTISED = frozenset(
    {
        "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "GatherBlockQuantized", "QMoE",
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM", "MatMulInteger", "MatMulIntegerToFloat", "ConvInteger",
        "QAttention", "QGemm", "QEmbedLayerNormalization",
    }
)  # fmt: skip
_BESIDE = {"int8-dynamic": ("FLOAT",)}


def refuse_quantised(model: ir.Model, source: Path) -> None:
    """Refuses a graph with quantised weights: a second rounding can't bring back the loss."""
    hint = "Quantise the float model. A quantised graph is cut as it is: depthcut prune."
    if QUANTIZATION_KEY in model.metadata_props:
        raise QuantizationError(
            f"{source} was quantised by depthcut already.", hint, code="already-quantized"
        )
    for node in model.graph.all_nodes():
        if node.op_type in _QUANTISED or node.op_type.startswith("QLinear"):
            where = node.name or node.outputs[0].name
            raise QuantizationError(
                f"{source} is quantised already: {where} is a {node.op_type}.",
                hint,
                code="already-quantized",
            )


def refuse_nothing_to_do(found: Products, source: Path) -> None:
    """Refuses a graph in which no product has a weight of its own."""
    if found.products:
        return
    first = next((f": {name}: {why}" for name, why in found.in_float.items()), "")
    raise QuantizationError(
        f"There is nothing to quantise in {source}: no product has a weight that can be{first}.",
        code="nothing-to-quantize",
    )


def refuse_unrunnable(settings: QuantizeSettings, kinds: Iterable[ir.DataType]) -> None:
    """Refuses weights of types beside which ONNX Runtime has no kernels for a scheme."""
    if settings.modelopt is not None:
        return
    possible = _BESIDE.get(settings.scheme, ("FLOAT", "FLOAT16"))
    wrong = next((kind.name for kind in kinds if kind.name not in possible), None)
    if wrong is not None:
        raise QuantizationError(
            f"{settings.scheme} takes weights in {' or '.join(possible)}, not in {wrong}.",
            "Export the model in float32.",
            code="wrong-dtype",
        )


def refuse_not_finite(matrix: NDArray[np.float32], name: str) -> None:
    """Refuses numbers that have no rounding."""
    if not np.isfinite(matrix).all():
        raise QuantizationError(
            f"The weight of {name} holds NaN or infinite numbers, which have no rounding.",
            "Export the model again.",
            code="not-finite",
        )
