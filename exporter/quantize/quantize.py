"""ONNX file in, ONNX file with its weights in fewer bits out. Needs no PyTorch, unless for HQQ."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from exporter.artifacts.forms import QUANTIZATION_KEY, QuantizationRecord
from exporter.cut.prune_files import stale_reports
from exporter.engines.environment import default_threads
from exporter.files import refuse_overwriting, sha256_file
from exporter.progress import QUIET, Progress
from exporter.quantize.calibration import CalibrationTokens, calibration_tokens
from exporter.quantize.companions import stage_companions
from exporter.quantize.difference import Difference, difference
from exporter.quantize.gguf_blocks import GgufBlocks
from exporter.quantize.modelopt import (
    method_of,
    quantise_with_modelopt,
    refuse_caches_in_place,
)
from exporter.quantize.products import Products, find_products
from exporter.quantize.refusals import (
    nothing_kept,
    refuse_nothing_to_do,
    refuse_quantised,
    refuse_unknown_nodes,
    refuse_unrunnable,
)
from exporter.quantize.sensitivity import MixedBits, search_mixed
from exporter.quantize.settings import QuantizeSettings
from exporter.quantize.weight_only import Quantised, WeightOnly

if TYPE_CHECKING:
    import onnx_ir as ir

NOTHING: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class QuantizationResult:
    """What a quantisation made.

    Attributes:
        record: What the graph says of it.
        bytes_before: Graph and weights.
        bytes_after: Graph and weights.
        difference: From the float graph, on random inputs.
        in_float: Name to reason, of weights that stayed.
        rounded_anew: Name to reason, of weights that couldn't keep a GGUF file's blocks.
        mixed: What a search for the scheme ``mixed`` found.
    """

    record: QuantizationRecord
    bytes_before: int
    bytes_after: int
    difference: Difference
    in_float: dict[str, str] = field(default_factory=dict)
    rounded_anew: dict[str, str] = field(default_factory=dict)
    mixed: MixedBits | None = None


def quantize_file(
    source: Path,
    output: Path,
    settings: QuantizeSettings,
    *,
    bits_by_node: Mapping[str, int] = NOTHING,
    progress: Progress = QUIET,
) -> QuantizationRecord:
    """As :func:`quantize_with_report`, of which it gives the record alone."""
    return quantize_with_report(
        source, output, settings, bits_by_node=bits_by_node, progress=progress
    ).record


def quantize_with_report(
    source: Path,
    output: Path,
    settings: QuantizeSettings,
    *,
    bits_by_node: Mapping[str, int] = NOTHING,
    with_companions: bool = False,
    progress: Progress = QUIET,
) -> QuantizationResult:
    """Quantises the weights of an ONNX file.

    The graph may come from any exporter, fused or not, cut or whole. Products keep their names, and
    the graph keeps its own notes, the plan of a cut among them. The result and its weights
    (``<output>.data``) appear together or not at all, after they have been run once. The source is
    never changed.

    Weight-only schemes hold one weight in memory at a time. The others are ONNX Runtime's own
    quantisers and ModelOpt's, which hold the whole model.

    Args:
        source: The ONNX file.
        output: The file to write, another than ``source``.
        settings: Into what, and how.
        bits_by_node: Bits (4 or 8) of single products by their names, before what ``settings`` say.
            Without any, the scheme ``mixed`` searches them on the calibration text.
        with_companions: Copies tokenizer and configs beside the output, where they don't stand in
            its folder yet.
        progress: Who is told.

    Returns:
        The record that the graph carries, what stayed in float and why, and how far its results
        are from the float graph's.

    Raises:
        UsageError: The settings don't fit each other or the graph.
        OnnxFileError: The source can't be read, or the output not written.
        QuantizationError: The graph is quantised already, holds nothing to quantise or numbers that
            aren't finite; the runtime can't run the scheme; or the result computes nonsense.
        CalibrationError: The text is too short, or tells nothing about a layer; or there is no
            tokenizer.
        BackendError: ONNX Runtime can't run the graph.
        MissingDependencyError: Without ONNX Runtime; HQQ without PyTorch; the Python that is named
            for ModelOpt without it.
    """
    from graph_passes.files import storage
    from graph_passes.files.placing import staging

    settings.refuse_nonsense(bits_given=bool(bits_by_node))
    model = storage.load_model(source)
    found = find_products(model)
    _refuse(model, found, source, output, settings, bits_by_node)
    method = (
        method_of(settings.scheme, settings.modelopt) if settings.modelopt else settings.rounding
    )
    tokens = None
    if settings.reads_text(bits_given=bool(bits_by_node)):
        tokens = calibration_tokens(source, settings.calibration or "")
    before = _bytes([source, *storage.data_files(model)])
    try:
        with staging(output) as staged:
            stage = staged.folder
            mixed = None
            if settings.scheme == "mixed" and not bits_by_node and tokens is not None:
                mixed = _searched(model, found, settings, tokens, stage, progress)
                bits_by_node = mixed.bits_by_node
            done = _quantised(model, found, stage, settings, bits_by_node, tokens, progress)
            record = _record(done, settings, method, tokens)
            note = record.model_dump_json(exclude_none=True)
            done.model.metadata_props[QUANTIZATION_KEY] = note
            written = storage.write_files(done.model, stage, output.name, "compact")
            gap = difference(source, stage / output.name, threads=default_threads())
            after = _bytes(written)
            moves = stage_companions(source, output, stage) if with_companions else []
            moves += [(file, output.parent / file.name) for file in written]
            needed = storage.data_files(model)
            stale = storage.stale_data(output, written, needed)
            staged.place(moves, [*stale, *stale_reports(output)])
    except OSError as error:
        raise storage.write_error(output, error) from error
    what = done.what
    return QuantizationResult(record, before, after, gap, what.in_float, what.rounded_anew, mixed)


@dataclass(frozen=True)
class _Done:
    model: ir.Model
    what: Quantised


def _refuse(
    model: ir.Model,
    found: Products,
    source: Path,
    output: Path,
    settings: QuantizeSettings,
    bits_by_node: Mapping[str, int],
) -> None:
    """All that can be refused before any work."""
    from graph_passes.files import storage

    refuse_quantised(model, source)
    if settings.modelopt is not None:
        refuse_caches_in_place(model, source)
    refuse_nothing_to_do(found, source)
    refuse_unknown_nodes(bits_by_node, found)
    texts = [Path(settings.calibration)] if settings.calibration else []
    files = [settings.gguf] if settings.gguf else []
    refuse_overwriting(output, [source, *storage.data_files(model), *texts, *files])
    storage.refuse_collision(model, output, "compact")
    kinds = {p.weight.const_value.dtype for p in found.products if p.weight.const_value is not None}
    refuse_unrunnable(settings, kinds)


def _searched(
    model: ir.Model,
    found: Products,
    settings: QuantizeSettings,
    tokens: CalibrationTokens,
    stage: Path,
    progress: Progress,
) -> MixedBits:
    folder = stage / "searched"
    folder.mkdir()
    try:
        return search_mixed(
            model, found, settings, tokens, folder, threads=default_threads(), progress=progress
        )
    finally:
        shutil.rmtree(folder)


def _quantised(
    model: ir.Model,
    found: Products,
    stage: Path,
    settings: QuantizeSettings,
    bits_by_node: Mapping[str, int],
    tokens: CalibrationTokens | None,
    progress: Progress,
) -> _Done:
    if settings.weight_only:
        gguf = GgufBlocks(settings.gguf) if settings.gguf else None
        work = WeightOnly(model, found, settings, bits_by_node, tokens, default_threads(), gguf)
        done = work.run(stage, progress)
        if gguf is not None and not done.kept:
            raise nothing_kept(gguf.path, done.rounded_anew)
        return _Done(model, done)
    if settings.modelopt is not None and tokens is not None:
        return _Done(
            *quantise_with_modelopt(
                model, found, stage, settings.scheme, tokens, settings.modelopt, progress
            )
        )
    from exporter.quantize.activations import quantise_activations

    return _Done(*quantise_activations(model, found, stage, tokens, default_threads()))


def _record(
    done: _Done, settings: QuantizeSettings, method: str, tokens: CalibrationTokens | None
) -> QuantizationRecord:
    weight_only = settings.weight_only
    return QuantizationRecord(
        scheme=settings.scheme,
        method=method,
        bits={str(bits): count for bits, count in sorted(done.what.bits.items())},
        block_size=settings.block if weight_only else None,
        symmetric=settings.without_zero_points if weight_only else None,
        accuracy_level=settings.level if weight_only else None,
        embedding_bits=done.what.embedding_bits,
        head_bits=done.what.head_bits,
        calibration=tokens.source if tokens else None,
        gguf=_named(settings.gguf) if settings.gguf else None,
        kept_blocks=done.what.kept,
    )


def _named(file: Path) -> str:
    return f"{file.name}, sha256 {sha256_file(file)[:16]}"


def _bytes(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)
