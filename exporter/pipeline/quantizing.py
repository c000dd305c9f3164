"""The stage of `depthcut export` that quantises both models, the cut one after it was cut."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from exporter.engines.usage import write_graph_use
from exporter.files import staged_directory
from exporter.pipeline.run import ARMS, QUANTIZED, Key, Run, file_hash, files_below
from exporter.pipeline.stages import WRITTEN_ANEW
from exporter.quantize.gguf_blocks import most_bits
from exporter.quantize.quantize import QuantizationResult, quantize_file
from exporter.quantize.settings import QuantizeSettings

_GRAPH = "model.onnx"


def with_method(run: Run, settings: QuantizeSettings) -> QuantizeSettings:
    """Chooses the method where none was asked for, and says which.

    A GGUF file's own blocks are kept, for rounding them a second time loses what the first one had
    kept; not where most of them have more bits than the scheme, or the blocks' form is asked for.
    """
    if settings.method is not None or not settings.weight_only:
        return settings
    file = Path(run.request.source).expanduser()
    if _keeps_blocks(file, settings):
        run.progress.say(f"quantize: by the method gguf, which keeps the blocks of {file.name}")
        return replace(settings, method="gguf", gguf=file)
    run.progress.say(f"quantize: by the method {settings.rounding}, no other was asked for")
    return replace(settings, method=settings.rounding)


def _keeps_blocks(file: Path, settings: QuantizeSettings) -> bool:
    chosen = settings.block_size is not None or settings.symmetric is not None
    if chosen or not file.is_file():
        return False
    bits = most_bits(file)
    return bits is not None and bits <= settings.bits


def quantize_key(run: Run, arm: str, settings: QuantizeSettings) -> Key:
    """The graph, how and by whom it is quantised, and the files that are looked at."""
    return {
        "graph": run.ledger.files_hash(ARMS[arm]),
        "settings": asdict(settings) | {"gguf": None},
        "texts": [file_hash(text) for text in settings.calibration],
        "gguf": None if settings.gguf is None else file_hash(str(settings.gguf)),
        "versions": run.versions,
    }


def quantize(run: Run, arm: str, settings: QuantizeSettings) -> tuple[list[Path], str]:
    """Quantises one of both models; what it was made from is noted."""
    source, folder = run.ledger.path(arm), run.ledger.work / QUANTIZED[arm]
    with staged_directory(folder) as stage:
        run.ledger.copy(ARMS[arm], arm, stage, leave_out=WRITTEN_ANEW)
        graph, progress = stage / _GRAPH, run.progress
        result = quantize_file(source / _GRAPH, graph, settings, progress=progress)
        write_graph_use(graph)
    run.progress.say(f"quantize: {arm}, {_sizes(result)}, {_bits(result)}")
    if result.difference.is_far:
        run.progress.say(f"quantize: {arm} gives answers far from the float model's")
    return files_below(folder), run.ledger.files_hash(ARMS[arm])


def _sizes(result: QuantizationResult) -> str:
    return f"{result.bytes_before / 1e6:,.1f} -> {result.bytes_after / 1e6:,.1f} MB"


def _bits(result: QuantizationResult) -> str:
    counts = result.record.bits.items()
    return ", ".join(f"{count} products of {width} bits" for width, count in counts)
