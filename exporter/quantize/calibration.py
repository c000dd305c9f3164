"""The text that a quantisation looks at, as tokens, and what products see while it is read."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir

from exporter.artifacts.latency import Shape
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.tensors import make_inputs, whole_phase
from exporter.errors import CalibrationError, QuantizationError, first_line
from exporter.models.model_folder import ModelFolder
from exporter.models.residual_stream import ranks_pairs
from exporter.models.texts.calibration import CalibrationText, joined, refuse_same
from exporter.models.texts.images import ImageReader, of_pixels, read_images
from exporter.models.texts.passages import LONGEST_PAIR, Form, pairs_to_read, sampled
from exporter.models.texts.samples import Batch
from exporter.models.texts.sources import read_texts
from exporter.models.texts.tokenizer import tokenizer_in
from exporter.optional import require
from exporter.progress import QUIET, Progress
from exporter.quantize.products import Product, Products, Quantised, find_products
from graph_passes.files.storage import load_model, write_files

_SAMPLES, _LENGTH = 32, 512
_TOKENIZER = "tokenizer.json"


def calibration_beside(
    model: Path,
    specs: Sequence[str],
    classes: int | str | None = None,
    progress: Progress = QUIET,
) -> CalibrationText:
    """Reads texts and cuts them into samples with the tokenizer that lies beside a model.

    Of a classifier of images it reads these. A reranker reads pairs, and so does each classifier
    of texts of a file of pairs, as where they are scored.
    """
    folder = ModelFolder.beside(model, model.parent)
    if folder.classifies_images:
        return _images_beside(folder, specs)
    if folder.tokenizer is None:
        raise CalibrationError(
            f"There is no {_TOKENIZER} beside {model}, so no text can be read.",
            "Copy the model's tokenizer there, or take a scheme that needs no text.",
            code="no-tokenizer",
        )
    length = min(_LENGTH, folder.longest_sequence or _LENGTH)
    ranks = ranks_pairs(classes, folder.config.get("problem_type"))
    tokenizer, samples = tokenizer_in(folder.tokenizer), list[CalibrationText]()
    for spec in specs:
        text, longest = read_texts(spec, part="calibration"), length
        form: Form = "windows"
        if classes is not None and pairs_to_read(text, scores_pairs=ranks, progress=progress):
            form, longest = "pairs", min(LONGEST_PAIR, length)
        most, units = length * math.ceil(_SAMPLES / len(specs)), text.units(longest)
        sample = sampled(form, tokenizer, text, units, tokens=most, longest=longest)
        padding = folder.config.get("pad_token_id")
        if isinstance(padding, int):
            sample = replace(sample, input_ids=np.where(sample.mask, sample.input_ids, padding))
        if sample.ref.tokens < length:
            raise CalibrationError(
                f"{spec} is too short to calibrate on: it gives fewer than {length} tokens.",
                "Name a longer text, or take a scheme that needs none: --quantize int8.",
                code="text-too-short",
            )
        samples.append(sample)
    refuse_same(samples)
    return joined(samples)


def _images_beside(folder: ModelFolder, specs: Sequence[str]) -> CalibrationText:
    """The first images of each source."""
    reader = ImageReader(str(folder.onnx), folder.onnx.parent, folder.config)
    most, samples = math.ceil(_SAMPLES / len(specs)), []
    for spec in specs:
        images = read_images(spec, part="calibration")
        pixels = reader.of_images(images, most, "calibration")
        samples.append(of_pixels(pixels, folder.patches, images.source, images.sha256))
    refuse_same(samples)
    return joined(samples)


def _feed(runner: OnnxRuntimeRunner, batch: Batch) -> dict[str, Any]:
    """A model's inputs for some samples at once, with an empty cache where it takes one."""
    shape = Shape(whole_phase(runner.inputs), *batch.ids.shape)
    made = dict(make_inputs(runner.inputs, shape, batch.ids))
    given: dict[str, Any] = {"attention_mask": batch.mask, "token_type_ids": batch.types}
    given |= batch.sources.arrays if batch.sources is not None else {}
    for name, array in given.items():
        if name in made and array is not None:
            made[name] = array.astype(made[name].dtype)
    return dict(runner.with_room(made))


_FLOAT, _INT8 = "float.onnx", "int8.onnx"
_WARNINGS, _ERRORS = 2, 3  # what ONNX Runtime logs by itself, and what it logs meanwhile
_LEFT_OUT = "the quantiser left it out"
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
    """
    for product in found.products:
        product.matrix()  # or it is refused
    plain = [product for product in found.products if not _is_turned(product)]
    for product in plain:
        product.node.name = product.name
    write_files(model, stage, _FLOAT, "compact")
    try:
        with _silence():
            _quantised_by_onnx_runtime(stage, [p.name for p in plain], tokens, threads)
    except Exception as error:  # the quantisers raise whatever comes
        raise QuantizationError(
            f"ONNX Runtime's quantiser fails on the graph: {first_line(error)}.",
            "Choose another scheme: --quantize int8.",
        ) from error
    result = load_model(stage / _INT8)
    result.metadata_props.update(model.metadata_props)
    left = find_products(result)
    in_float = found.in_float | left.in_float
    in_float |= {p.name: _TIED if _is_turned(p) else _LEFT_OUT for p in left.products}
    if len(left.products) == len(found.products):
        name, why = next(iter(in_float.items()))
        raise QuantizationError(
            f"ONNX Runtime's quantiser left every product in float: {name}: {why}.",
            "Choose another scheme: --quantize int8.",
            code="nothing-to-quantize",
        )
    had_head, has_head = (any(p.head for p in products.products) for products in (found, left))
    bits = {8: len(found.products) - len(left.products)}
    return result, Quantised(bits, 8 if had_head and not has_head else None, None, in_float)


def _quantised_by_onnx_runtime(
    stage: Path, names: list[str], tokens: CalibrationText | None, threads: int
) -> None:
    module = require("onnxruntime.quantization", extra="cpu")
    files = str(stage / _FLOAT), str(stage / _INT8)
    common = {
        "op_types_to_quantize": ["MatMul", "Gemm"],
        "per_channel": True,
        "weight_type": module.QuantType.QInt8,
        "use_external_data_format": True,
    }
    if tokens is None:
        module.quantize_dynamic(*files, extra_options={"MatMulConstBOnly": True}, **common)
        return
    with OnnxRuntimeRunner(stage / _FLOAT, threads=threads) as runner:
        feeds = iter([_feed(runner, batch.trimmed()) for batch in tokens.batches(1)])
    module.quantize_static(
        *files,
        SimpleNamespace(get_next=lambda: next(feeds, None)),
        quant_format=module.QuantFormat.QDQ,
        nodes_to_quantize=names,  # or attention's products of two activations would go along
        activation_type=module.QuantType.QInt8,
        extra_options={  # symmetric on both sides, which is what TensorRT's parser takes
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            # Results in 8 bits as well cost SmolLM2 more than their inputs do.
            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
        },
        **common,
    )


def _is_turned(product: Product) -> bool:
    return product.node.inputs[1] is not product.weight


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps the quantisers' advice, which is not about what was asked for, off the console."""
    before, runtime = logging.root.manager.disable, require("onnxruntime", extra="cpu")
    logging.disable(logging.WARNING)
    runtime.set_default_logger_severity(_ERRORS)
    try:
        yield
    finally:
        runtime.set_default_logger_severity(_WARNINGS)
        logging.disable(before)
