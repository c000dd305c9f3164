"""What is refused before any work: graphs that are quantised, and what the runtime can't run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.artifacts.comparison import QUANTIZATION_KEY
from exporter.engines.runners.sessions import new_session
from exporter.errors import QuantizationError, first_line
from exporter.optional import require
from exporter.quantize.products import Products
from exporter.quantize.rewrite import DOMAIN, matmul_nbits
from exporter.quantize.settings import QuantizeSettings

_QUANTISED = frozenset(
    {
        "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "GatherBlockQuantized", "QMoE",
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM", "MatMulInteger", "MatMulIntegerToFloat", "ConvInteger",
        "QAttention", "QGemm", "QEmbedLayerNormalization",
    }
)  # fmt: skip
_PROBE_DEPTH = 64
_ACTIVATIONS_BESIDE = {"int8-dynamic": ("FLOAT",), "int8-qdq": ("FLOAT", "FLOAT16")}


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
    """Asks the installed ONNX Runtime to load and run one small product of each type and width.

    What computes in int8 is known beforehand, and not tried.
    """
    ort = require("onnxruntime", extra="cpu")
    if not settings.weight_only:
        if settings.modelopt is None:
            _refuse_type(settings, kinds)
        return
    widths = {settings.bits, settings.head_bits or settings.bits}
    for kind in sorted(set(kinds)):
        for bits in sorted(widths):
            try:
                session = new_session(_probe(kind, bits, settings))
                session.run(None, {"x": np.zeros((1, _PROBE_DEPTH), kind.numpy())})
            except Exception as error:  # each of ONNX Runtime's own classes derives from Exception
                raise QuantizationError(
                    f"onnxruntime {ort.__version__} can't run {bits}-bit weights in blocks of "
                    f"{settings.block} beside {kind.name}: {first_line(error)}.",
                    "Update onnxruntime, export the model in float32, or choose another scheme.",
                    code="no-kernel",
                ) from error


def _refuse_type(settings: QuantizeSettings, kinds: Iterable[ir.DataType]) -> None:
    possible = _ACTIVATIONS_BESIDE[settings.scheme]
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


def _probe(kind: ir.DataType, bits: int, settings: QuantizeSettings) -> bytes:
    """A model with one MatMulNBits and nothing else, serialised."""
    block = settings.block
    blocks = -(-_PROBE_DEPTH // block)
    x = ir.Value(name="x", shape=ir.Shape([None, _PROBE_DEPTH]), type=ir.TensorType(kind))
    quants = _initializer("b", np.zeros((1, blocks, block * bits // 8), np.uint8))
    scales = _initializer("s", np.ones((1, blocks), kind.numpy()))
    size = (_PROBE_DEPTH, 1)
    node = matmul_nbits([x, quants, scales], "probe", size, bits, block, settings.level)
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape([None, 1]), ir.TensorType(kind)
    graph = ir.Graph(
        [x], [y], nodes=[node], initializers=[quants, scales],
        opset_imports={"": 20, DOMAIN: 1}, name="probe",
    )  # fmt: skip
    data: bytes = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return data


def _initializer(name: str, array: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    shape, kind = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
    return ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
