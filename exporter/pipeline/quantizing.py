"""The stage of `depthcut export` that quantises both models, the cut one after it was cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from exporter.engines.usage import write_graph_use
from exporter.files import staged_directory
from exporter.pipeline.keys import Key, file_hash
from exporter.pipeline.run import ARMS, QUANTIZE, QUANTIZED, Run, files_below
from exporter.pipeline.shared import take_or_make
from exporter.pipeline.stages import WRITTEN_ANEW
from exporter.quantize.gguf_blocks import most_bits
from exporter.quantize.modelopt import modelopt_version
from exporter.quantize.products import find_products
from exporter.quantize.quantize import QuantizationResult, quantize_file
from exporter.quantize.settings import QuantizeSettings
from graph_passes.files.storage import load_model

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
    if settings.scheme == "mixed" or not file.is_file():
        return False
    if settings.block_size is not None or settings.symmetric is not None:
        return False
    bits = most_bits(file)
    return bits is not None and bits <= settings.bits


def quantize_key(run: Run, settings: QuantizeSettings) -> Key:
    """Both graphs, how and by whom they are quantised, and the files that are looked at."""
    return {
        **run.sources(),
        "settings": asdict(settings) | {"gguf": None, "modelopt": None},
        "texts": [file_hash(text) for text in settings.calibration],
        "gguf": None if settings.gguf is None else file_hash(str(settings.gguf)),
        "modelopt": None if settings.modelopt is None else modelopt_version(settings.modelopt),
        "versions": run.versions,
    }


def quantize(run: Run, settings: QuantizeSettings) -> tuple[list[Path], dict[str, str]]:
    """Quantises both models alike; what they were made from is noted.

    Which products ``mixed`` keeps in 8 bits is searched on the whole model, for both.
    """
    files: list[Path] = []
    bits_by_node: Mapping[str, int] = {}
    shared, work = run.request.shared, run.ledger.work
    for arm in ARMS:
        key = _arm_key(run, settings, arm, bits_by_node)
        make = partial(_quantize_arm, run, arm, settings, bits_by_node)
        (made, bits_by_node), now = take_or_make(shared, f"{QUANTIZE}-{arm}", key, work, make)
        if not now:
            run.progress.say(f"quantize: {arm}, shared, it was made from the same before")
        files += made
    return files, run.sources()


def _arm_key(
    run: Run, settings: QuantizeSettings, arm: str, bits_by_node: Mapping[str, int]
) -> Key:
    """What one quantised model depends on; the other doesn't matter to it."""
    others = dict.fromkeys(other for other in ARMS if other != arm)
    return {**quantize_key(run, settings), **others, "bits": dict(bits_by_node)}


def _quantize_arm(
    run: Run, arm: str, settings: QuantizeSettings, bits_by_node: Mapping[str, int]
) -> tuple[list[Path], Mapping[str, int]]:
    """One model's files, and the bits of its products where those were searched."""
    source, folder = run.ledger.path(arm), run.ledger.work / QUANTIZED[arm]
    with staged_directory(folder) as stage:
        run.ledger.copy(ARMS[arm], arm, stage, leave_out=WRITTEN_ANEW)
        result = _quantized(run, source / _GRAPH, stage / _GRAPH, settings, bits_by_node)
        write_graph_use(stage / _GRAPH)
    run.progress.say(f"quantize: {arm}, {_sizes(result)}, {_bits(result)}")
    if result.difference.is_far:
        run.progress.say(f"quantize: {arm} gives answers far from the float model's")
    found = bits_by_node if result.mixed is None else result.mixed.bits_by_node
    return files_below(folder), dict(found)


def _quantized(
    run: Run,
    source: Path,
    output: Path,
    settings: QuantizeSettings,
    bits_by_node: Mapping[str, int],
) -> QuantizationResult:
    if bits_by_node:  # without what was cut
        left = {product.name for product in find_products(load_model(source)).products}
        bits_by_node = {name: bits for name, bits in bits_by_node.items() if name in left}
    return quantize_file(source, output, settings, bits_by_node=bits_by_node, progress=run.progress)


def _sizes(result: QuantizationResult) -> str:
    return f"{result.bytes_before / 1e6:,.1f} -> {result.bytes_after / 1e6:,.1f} MB"


def _bits(result: QuantizationResult) -> str:
    counts = result.record.bits.items()
    return ", ".join(f"{count} products of {width} bits" for width, count in counts)
