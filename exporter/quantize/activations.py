"""Schemes that compute in int8, by ONNX Runtime's own quantisers of whole models.

Both load the whole model, and know weights only as a MatMul's or Gemm's operand, so a head that
reads the embedding's table through a Transpose stays in float.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import QuantizationError, first_line
from exporter.models.texts.calibration import CalibrationText
from exporter.optional import require
from exporter.quantize.calibration import feeds
from exporter.quantize.products import Product, Products, Quantised
from exporter.quantize.refusals import refuse_not_finite
from graph_passes.files.storage import load_model, write_files

if TYPE_CHECKING:
    import onnx_ir as ir

_MODULE = "onnxruntime.quantization"
_FLOAT, _INT8 = "float.onnx", "int8.onnx"
_TIED = "it reads the embedding's table through a Transpose"


def quantise_activations(
    model: ir.Model,
    found: Products,
    stage: Path,
    tokens: CalibrationText | None,
    threads: int,
) -> tuple[ir.Model, Quantised]:
    """Has ONNX Runtime quantise a graph's products: weights and what they are multiplied with.

    ``int8-dynamic`` takes the activations' scales anew in each run, ``int8-qdq`` once from a text.

    Args:
        model: The float graph.
        found: Its products.
        stage: A staging folder for files on the way.
        tokens: The calibration text: with one, ``int8-qdq``, else ``int8-dynamic``.
        threads: For running the model on it.

    Returns:
        The quantised graph, with the float graph's notes, whose weights lie in ``stage``; and what
        was done.

    Raises:
        QuantizationError: A weight isn't finite; ONNX Runtime's quantiser fails, or leaves all
            products in float.
    """
    for product in found.products:
        refuse_not_finite(product.matrix(), product.name)
    plain = [_named(product) for product in found.products if not _is_turned(product)]
    write_files(model, stage, _FLOAT, "compact")
    try:
        with _silence():
            if tokens is None:
                _dynamic(stage)
            else:
                _static(stage, plain, tokens, threads)
    except Exception as error:  # the quantisers raise whatever comes
        raise QuantizationError(
            f"ONNX Runtime's quantiser fails on the graph: {first_line(error)}.",
            "Choose another scheme: --quantize int8.",
        ) from error
    result = load_model(stage / _INT8)
    result.metadata_props.update(model.metadata_props)
    done = Quantised.of_result(found, result, 8, _why_left)
    if not done.bits[8]:
        name, why = next(iter(done.in_float.items()))
        raise QuantizationError(
            f"ONNX Runtime's quantiser left every product in float: {name}: {why}.",
            "Choose another scheme: --quantize int8.",
            code="nothing-to-quantize",
        )
    return result, done


def _dynamic(stage: Path) -> None:
    module = require(_MODULE, extra="cpu")
    module.quantize_dynamic(
        str(stage / _FLOAT),
        str(stage / _INT8),
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=module.QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True},
    )


def _static(stage: Path, names: list[str], tokens: CalibrationText, threads: int) -> None:
    module = require(_MODULE, extra="cpu")
    with OnnxRuntimeRunner(stage / _FLOAT, threads=threads) as runner:
        inputs = list(feeds(runner, tokens))
    module.quantize_static(
        str(stage / _FLOAT),
        str(stage / _INT8),
        _reader(inputs),
        quant_format=module.QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm"],
        nodes_to_quantize=names,  # or attention's products of two activations would go along
        per_channel=True,
        activation_type=module.QuantType.QUInt8,
        weight_type=module.QuantType.QInt8,
        use_external_data_format=True,
        # Results in 8 bits as well cost SmolLM2 more than their inputs do.
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
    )


def _reader(inputs: list[dict[str, object]]) -> Any:
    """A text's samples as ONNX Runtime's calibration asks for them: one a call, then None."""
    base: Any = require(f"{_MODULE}.calibrate", extra="cpu").CalibrationDataReader
    waiting = iter(inputs)

    class Reader(base):  # type: ignore[misc]
        def get_next(self) -> dict[str, object] | None:
            return next(waiting, None)

    return Reader()


def _is_turned(product: Product) -> bool:
    return product.node.inputs[1] is not product.weight


def _named(product: Product) -> str:
    """Its name; its node gets it, where it has none."""
    product.node.name = product.name
    return product.name


def _why_left(product: Product) -> str:
    return _TIED if _is_turned(product) else "the quantiser left it out"


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps the quantisers' advice, which is not about what was asked for, off the console."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
