"""ONNX file in, ONNX file with its weights in fewer bits out. Needs no PyTorch, unless for HQQ."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.comparison import QUANTIZATION_KEY, QuantizationRecord
from exporter.artifacts.plans import note_texts
from exporter.cut.prune_files import stale_reports
from exporter.cut.random_inputs import cases, draw
from exporter.engines.decoding.decoder import LOGITS
from exporter.engines.environment import default_threads
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.usage import stage_graph_use
from exporter.errors import QuantizationError
from exporter.files import refuse_overwriting, sha256_file
from exporter.models.ablation.damage import Distributions, divergence
from exporter.models.genai_config import CONFIG_FILE, find_config, rewritten
from exporter.models.graph_facts import output_shape
from exporter.models.residual_stream import classes_of_texts
from exporter.models.sentence_folder import stage_companions
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import QUIET, Progress
from exporter.quantize.calibration import calibration_beside, quantise_activations
from exporter.quantize.gguf_blocks import GgufBlocks
from exporter.quantize.products import Products, Quantised, find_products
from exporter.quantize.settings import QuantizeSettings
from exporter.quantize.weight_only import WeightOnly
from graph_passes.files import storage
from graph_passes.files.kinds import ONNX
from graph_passes.files.locations import real
from graph_passes.files.placing import staging
from graph_passes.files.storage import load_model

if TYPE_CHECKING:
    import onnx_ir as ir

# No model knows what follows random tokens: int4 alone gave 1.5 there on SmolLM2, a broken graph 8.
_FAR_NATS = 4.0


_QUANTISED = frozenset(
    {
        "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "GatherBlockQuantized", "QMoE",
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM", "MatMulInteger", "MatMulIntegerToFloat", "ConvInteger",
        "QAttention", "QGemm", "QEmbedLayerNormalization",
    }
)  # fmt: skip


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


@dataclass(frozen=True)
class RoundingDifference:
    """On random inputs, so it tells a broken graph from a rounded one and nothing about texts."""

    max_abs_error: float
    largest: float
    kl_divergence: float | None

    @property
    def is_far(self) -> bool:
        """Whether the distributions over tokens have little in common."""
        return self.kl_divergence is not None and self.kl_divergence > _FAR_NATS


def rounding_difference(source: Path, result: Path, *, threads: int) -> RoundingDifference:
    """Runs both once, one after the other."""
    model = load_model(source)
    feed = draw(model, cases(model)[0], np.random.default_rng(0))
    name = model.graph.outputs[0].name or ""
    before, after = (_output(path, feed, name, threads) for path in (source, result))
    finite = np.isfinite(before)
    if not finite.any() or not np.isfinite(after[finite]).all():
        raise QuantizationError(
            f"The quantised graph gives numbers in {name} that are not finite.",
            "Take more bits, smaller blocks, or the accuracy level 1.",
        )
    rows = finite.all(axis=-1)
    gap, largest = np.abs(before - after)[finite].max(), np.abs(before[finite]).max()
    kl = None
    if "logits" in name and rows.any():
        no_targets = np.empty(0, np.int64)
        arms = (Distributions(array[rows], no_targets, "The logits") for array in (before, after))
        kl = float(divergence(*arms).mean())
    return RoundingDifference(float(gap), float(largest), kl)


def _output(path: Path, feed: dict[str, Any], name: str, threads: int) -> NDArray[np.float64]:
    with OnnxRuntimeRunner(path, threads=threads, brief=True) as runner:
        return runner.run(feed, [name])[name].astype(np.float64)


@dataclass(frozen=True)
class QuantizationResult:
    """What a quantisation made."""

    record: QuantizationRecord
    bytes_before: int
    bytes_after: int
    difference: RoundingDifference
    in_float: dict[str, str] = field(default_factory=dict)
    rounded_anew: dict[str, str] = field(default_factory=dict)


def quantize_file(
    source: Path | str,
    output: Path | str,
    settings: QuantizeSettings,
    *,
    progress: Progress = QUIET,
) -> QuantizationResult:
    """Quantises the weights of an ONNX file.

    The graph may come from any exporter, fused or not, cut or whole. Products keep their names, the
    graph its notes. Config and tokenizer come along. The result and its weights appear together or
    not at all, after they have been run once. Weight-only schemes hold one weight in memory at a
    time, the others the whole model.

    Args:
        source: The ONNX file.
        output: The new file.
        settings: The scheme, such as int8 or int4, and what it is calibrated on.
        progress: Hears of each step.

    Returns:
        What was quantised, and the bytes before and after.

    Raises:
        OnnxFileError: There is no such file, or it can't be read.
        QuantizationError: Nothing in the graph can be quantised so, or the result doesn't run.
        UsageError: The result would take an input's place.
    """
    source, output = Path(source), Path(output)
    model = storage.load_model(source)
    products = find_products(model)
    _refuse(source, model, products, settings, output)
    tokens = None
    if settings.needs_calibration:
        classes = classes_of_texts(output_shape(model, LOGITS))
        tokens = calibration_beside(source, settings.calibration, classes, progress)
    before = _bytes([source, *storage.data_files(model)])
    try:
        with staging(output) as staged:
            stage = staged.folder
            if settings.weight_only:
                gguf = GgufBlocks(settings.gguf) if settings.gguf else None
                done = WeightOnly(model, products, settings, gguf).run(stage, progress)
                result = model
            else:
                result, done = quantise_activations(
                    model, products, stage, tokens, default_threads()
                )
            record = _record(done, settings, tokens)
            result.metadata_props[QUANTIZATION_KEY] = record.model_dump_json(exclude_none=True)
            if tokens is not None:
                note_texts(result.metadata_props, {"quantised": tokens.ref.texts})
            written = storage.write_files(result, stage, output.name, "compact")
            gap = rounding_difference(source, stage / output.name, threads=default_threads())
            after = _bytes(written)
            moves = _companions(source, output, stage) + stage_graph_use(output, stage)
            moves += [(file, output.parent / file.name) for file in written]
            stale = storage.stale_data(output, written, storage.data_files(model))
            staged.place(moves, [*stale, *stale_reports(output)])
    except OSError as error:
        raise storage.write_error(output, error) from error
    return QuantizationResult(record, before, after, gap, done.in_float, done.rounded_anew)


def _refuse(
    source: Path, model: ir.Model, found: Products, settings: QuantizeSettings, output: Path
) -> None:
    """All that can be refused before any work."""
    refuse_quantised(model, source)
    if not found.products:
        first = next((f": {n}: {why}" for n, why in found.in_float.items()), "")
        raise QuantizationError(
            f"There is nothing to quantise in {source}: no product has a weight that can "
            f"be{first}.",
            code="nothing-to-quantize",
        )
    files = [settings.gguf] if settings.gguf else []
    read = [source, *storage.data_files(model), *map(Path, settings.calibration), *files]
    refuse_overwriting(output, read, ONNX)
    storage.refuse_collision(model, output, "compact")
    tensors = (product.weight.const_value for product in found.products)
    settings.refuse(t.dtype.numpy().name for t in tensors if t is not None)


def _record(
    done: Quantised, settings: QuantizeSettings, tokens: CalibrationText | None
) -> QuantizationRecord:
    gguf = settings.gguf
    shaped: dict[str, Any] = {}
    if settings.weight_only:
        shaped = {
            "block_size": settings.block,
            "symmetric": settings.without_zero_points,
            "accuracy_level": settings.level,
        }
    return QuantizationRecord(
        scheme=settings.scheme,
        method=settings.rounding,
        bits={str(bits): count for bits, count in sorted(done.bits.items())},
        embedding_bits=done.embedding_bits,
        head_bits=done.head_bits,
        calibration=_noted(tokens.ref.source, tokens.ref.sha256) if tokens else None,
        gguf=_noted(gguf.name, sha256_file(gguf)) if gguf else None,
        kept_blocks=done.kept,
        **shaped,
    )


def _noted(name: str, sha256: str) -> str:
    return f"{name}, sha256 {sha256[:16]}"


def _bytes(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _companions(source: Path, output: Path, stage: Path) -> list[tuple[Path, Path]]:
    """What the source ships with, and onnxruntime-genai's config with the output's name."""
    if real(source.parent) == real(output.parent):
        return []
    moves = stage_companions(source, output, stage)
    config, target = find_config(source), output.parent / CONFIG_FILE
    if config is not None and not target.exists():
        staged = stage / CONFIG_FILE
        staged.write_text(rewritten(config, output.name, (), (), {}), encoding="utf-8")
        moves.append((staged, target))
    return moves
