"""The text that a quantisation looks at, as tokens, and what products see while it is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.artifacts import Phase
from exporter.artifacts.latency import Shape
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.inputs import has_cache, make_inputs
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.tensors import TensorSpec
from exporter.errors import CalibrationError
from exporter.models.model_folder import ModelFolder
from exporter.models.texts.batches import Sources
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.image_reader import ImageReader, of_pixels
from exporter.models.texts.images import read_images
from exporter.models.texts.mixtures import joined, refuse_same
from exporter.models.texts.packing import pack_tokens
from exporter.models.texts.sources import TextSource, read_texts
from exporter.progress import Progress
from exporter.quantize.products import Product
from graph_passes.files.storage import write_files

_SAMPLES, _LENGTH = 32, 512
_LEAST_LENGTH = 16
_MOMENTS_BYTES = 1 << 30
_FILE, _TOKENIZER = "watched.onnx", "tokenizer.json"

Moments = NDArray[np.float32]


def calibration_beside(model: Path, specs: Sequence[str]) -> CalibrationText:
    """Reads texts and cuts them into samples with the tokenizer that lies beside a model.

    Of a classifier of images it reads these.

    Args:
        model: The ONNX file.
        specs: As :func:`exporter.models.texts.sources.read_texts` takes them, or
            :func:`exporter.models.texts.images.read_images`; alike much of each.

    Raises:
        TextSourceError: The text can't be read, or an image.
        CalibrationError: It isn't long enough for one sample, or there is no tokenizer.
        ModelSourceError: The settings of the image processor are missing, or another model's.
    """
    folder = ModelFolder.beside(model, model.parent)
    if folder.classifies_images:
        return _images_beside(folder, specs)
    if not model.with_name(_TOKENIZER).is_file():
        raise CalibrationError(
            f"There is no {_TOKENIZER} beside {model}, so no text can be read.",
            "Copy the model's tokenizer there, or take a method that needs no text.",
            code="no-tokenizer",
        )
    tokenizer = TextModel.of(model)
    texts = [read_texts(spec, part="calibration") for spec in specs]
    length = min(_LENGTH, tokenizer.positions or _LENGTH)
    most = math.ceil(_SAMPLES / len(specs))
    found = _packed(tokenizer, texts, length, most)
    if not all(map(len, found)) and length > _LEAST_LENGTH:
        found = _packed(tokenizer, texts, _LEAST_LENGTH, most * length // _LEAST_LENGTH)
    for text, ids in zip(texts, found, strict=True):
        if ids.size < length:
            raise CalibrationError(
                f"{text.source} is too short to calibrate on: it gives fewer than {length} tokens.",
                "Name a longer text, or take a method that needs none: --quantize-method rtn.",
                code="text-too-short",
            )
    samples = [
        CalibrationText.unpadded(ids, text.source, text.sha256)
        for text, ids in zip(texts, found, strict=True)
    ]
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


def _packed(
    tokenizer: TextModel, texts: Sequence[TextSource], length: int, most: int
) -> list[NDArray[np.int64]]:
    """Samples of each text, all of one length."""
    return [
        pack_tokens(tokenizer.encode, text, sequence_length=length, max_samples=most)
        for text in texts
    ]


def feed(
    specs: Sequence[TensorSpec], token_ids: NDArray[np.int64], sources: Sources | None = None
) -> dict[str, NDArray[Any]]:
    """A model's inputs for some samples at once, with an empty cache where it takes one.

    Args:
        specs: What the model takes.
        token_ids: ``[samples, tokens]``.
        sources: Images in their place.
    """
    phase: Phase = "prefill" if has_cache(specs) else "encode"
    made = dict(make_inputs(specs, Shape(phase, *token_ids.shape), token_ids))
    if sources is not None:
        made |= {name: each.astype(made[name].dtype) for name, each in sources.arrays.items()}
    return made


def feeds(runner: OnnxRuntimeRunner, text: CalibrationText) -> Iterator[dict[str, Any]]:
    """A model's inputs for one sample after the other."""
    rows = (text.rows(slice(place, place + 1)) for place in range(len(text.input_ids)))
    return (feed(runner.inputs, row.input_ids, row.sources) for row in rows)


def second_moments(
    model: ir.Model,
    products: Sequence[Product],
    text: CalibrationText,
    folder: Path,
    *,
    threads: int,
    progress: Progress,
) -> Iterator[tuple[ir.Value, Moments]]:
    """The mean of ``x x^T`` of each different input of some products.

    The model is run once for as many inputs as fit one gigabyte of moments.

    Args:
        model: The float graph; it is unchanged.
        products: Whose inputs are watched.
        text: The text.
        folder: A staging folder, where a copy of the model with the inputs as outputs is written.
        threads: For ONNX Runtime.
        progress: Told of each step.

    Yields:
        The input, and ``[K, K]``.
    """
    watched = {product.node.inputs[0]: product for product in products}
    readers = {value: product for value, product in watched.items() if value is not None}
    values, depths = list(readers), {value: reader.depth for value, reader in readers.items()}
    file = _with_outputs(model, readers, folder)
    with OnnxRuntimeRunner(file, threads=threads) as runner:
        for group in _groups(values, [4 * depths[value] ** 2 for value in values]):
            names = [value.name or "" for value in group]
            moments = [np.zeros((depths[value],) * 2, np.float32) for value in group]
            with progress.task(
                "reading the calibration samples", len(text.input_ids), "samples"
            ) as task:
                for inputs in feeds(runner, text):
                    seen = runner.run(inputs, names)
                    for name, moment in zip(names, moments, strict=True):
                        rows = seen[name].reshape(-1, len(moment)).astype(np.float32)
                        moment += rows.T @ rows  # symmetric, so NumPy computes half of it
                    task.advance()
            for value, moment in zip(group, moments, strict=True):
                moment /= text.input_ids.size
                yield value, moment


def _groups(values: Sequence[ir.Value], sizes: Sequence[int]) -> Iterator[list[ir.Value]]:
    group: list[ir.Value] = []
    held = 0
    for value, size in zip(values, sizes, strict=True):
        if group and held + size > _MOMENTS_BYTES:
            yield group
            group, held = [], 0
        group.append(value)
        held += size
    if group:
        yield group


def _with_outputs(model: ir.Model, readers: Mapping[ir.Value, Product], folder: Path) -> Path:
    """Writes the model with the inputs of some products in place of its outputs.

    ONNX Runtime leaves out nodes that no output comes from: the head, if it isn't watched.
    """
    outputs = list(model.graph.outputs)
    untyped = [value for value in readers if value.type is None]
    try:
        for value in untyped:
            weight = readers[value].weight.const_value
            assert weight is not None
            value.type = ir.TensorType(weight.dtype)
        model.graph.outputs[:] = list(readers)
        write_files(model, folder, _FILE, "compact")
    finally:
        model.graph.outputs[:] = outputs
        for value in untyped:
            value.type = None
    return folder / _FILE
