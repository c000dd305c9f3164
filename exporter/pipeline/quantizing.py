"""The stage of `depthcut export` that quantises both models, the cut one after it was cut."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from exporter.pipeline.request import ExportRequest
from exporter.pipeline.run import ARMS, QUANTIZED, Key, Run, file_hash
from exporter.progress import Progress
from exporter.quantize.gguf_blocks import most_bits
from exporter.quantize.quantize import quantize_file
from exporter.quantize.settings import QuantizeSettings

_GRAPH = "model.onnx"
WRITTEN_ANEW = (_GRAPH, "model.onnx*.data", "USE.md")
"""Patterns of what of a model's folder is written anew for another form of it."""


def with_method(request: ExportRequest, progress: Progress) -> ExportRequest:
    """Chooses the method where none was asked for, and says which.

    A GGUF file's own blocks are kept, for rounding them a second time loses what the first one had
    kept; not where most of them have more bits than the scheme, or the blocks' form is asked for.
    """
    settings = request.quantize
    if settings is None or settings.method is not None or not settings.weight_only:
        return request
    file = Path(request.source).expanduser()
    if _keeps_blocks(file, settings):
        progress.say(f"quantize: by the method gguf, which keeps the blocks of {file.name}")
        chosen = replace(settings, method="gguf", gguf=file)
    else:
        progress.say(f"quantize: by the method {settings.rounding}, no other was asked for")
        chosen = replace(settings, method=settings.rounding)
    return replace(request, quantize=chosen)


def _keeps_blocks(file: Path, settings: QuantizeSettings) -> bool:
    chosen = settings.block_size is not None or settings.symmetric is not None
    if chosen or not file.is_file():
        return False
    bits = most_bits(file)
    return bits is not None and bits <= settings.bits


def quantize_key(run: Run) -> Key:
    """How and by whom the graph is quantised, and the files that are looked at."""
    settings = run.request.quantize
    assert settings is not None
    return {
        "settings": asdict(settings) | {"gguf": None},
        "texts": [file_hash(text) for text in settings.calibration],
        "gguf": None if settings.gguf is None else file_hash(str(settings.gguf)),
    }


def quantize(run: Run, folder: Path, *, arm: str) -> None:
    """Quantises one of both models."""
    settings, target = run.request.quantize, folder / QUANTIZED[arm]
    assert settings is not None
    target.mkdir()
    run.ledger.copy(ARMS[arm], arm, target, leave_out=WRITTEN_ANEW)
    source, graph = run.ledger.path(arm) / _GRAPH, target / _GRAPH
    result = quantize_file(source, graph, settings, progress=run.progress)
    sizes = f"{result.bytes_before / 1e6:,.1f} -> {result.bytes_after / 1e6:,.1f} MB"
    counts = result.record.bits.items()
    bits = ", ".join(f"{count} products of {width} bits" for width, count in counts)
    run.progress.say(f"quantize: {arm}, {sizes}, {bits}")
    if result.difference.is_far:
        run.progress.say(f"quantize: {arm} gives answers far from the float model's")
