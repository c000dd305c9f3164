"""The stage of `depthcut export` that quantises both models, the cut one after it was cut."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from exporter.artifacts import QuantizationRecord
from exporter.files import staged_directory
from exporter.pipeline.keys import Key, file_hash
from exporter.pipeline.run import ARMS, QUANTIZED, Run, files_below
from exporter.pipeline.stages import WEIGHT_FILES
from exporter.quantization.settings import QuantizeSettings


def quantize_key(run: Run, settings: QuantizeSettings) -> Key:
    """Both graphs, how they are quantised, and the text that is looked at."""
    return {
        **run.sources(),
        "settings": asdict(settings) | {"gguf": None},
        "text": file_hash(settings.calibration),
        "gguf": None if settings.gguf is None else file_hash(str(settings.gguf)),
        "versions": run.versions,
    }


def quantize(run: Run, settings: QuantizeSettings) -> tuple[list[Path], dict[str, str]]:
    """Quantises both models alike; what they were made from is noted."""
    files = []
    for arm in ARMS:
        source, folder = run.ledger.path(arm), run.ledger.work / QUANTIZED[arm]
        with staged_directory(folder) as stage:
            weights = shutil.ignore_patterns(*WEIGHT_FILES)
            shutil.copytree(source, stage, ignore=weights, dirs_exist_ok=True)
            record = _quantized(run, source / "model.onnx", stage / "model.onnx", settings)
        files += files_below(folder)
        run.progress.say(f"quantize: {arm}, {_sizes(source, folder)}, {_bits(record)}")
    return files, run.sources()


def _quantized(
    run: Run, source: Path, output: Path, settings: QuantizeSettings
) -> QuantizationRecord:
    from exporter.quantization.quantize import quantize_file

    return quantize_file(source, output, settings, progress=run.progress)


def _sizes(source: Path, folder: Path) -> str:
    before, after = (
        sum(file.stat().st_size for file in where.glob("model.onnx*")) for where in (source, folder)
    )
    return f"{before / 1e6:,.1f} -> {after / 1e6:,.1f} MB"


def _bits(record: QuantizationRecord) -> str:
    return ", ".join(f"{count} products of {width} bits" for width, count in record.bits.items())
