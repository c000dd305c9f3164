"""The stage of `depthcut export` that quantises both models, the cut one after it was cut."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from exporter.artifacts.store import StoreEntry, in_turn, key_hash
from exporter.engines.usage import write_graph_use
from exporter.files import staged_directory, write_text
from exporter.pipeline.run import ARMS, QUANTIZE, QUANTIZED, Key, Run, file_hash, files_below
from exporter.pipeline.stages import WRITTEN_ANEW
from exporter.quantize.gguf_blocks import most_bits
from exporter.quantize.quantize import QuantizationResult, quantize_file
from exporter.quantize.settings import QuantizeSettings
from graph_passes.errors import UnsafeInputError
from graph_passes.files.placing import remove_tree
from graph_passes.files.reading import read_json

SHARED = frozenset({"score", "plan", "healing", "export", "prune"})
"""The stages whose results don't depend on who asks; times are always a folder's own."""
Finished = tuple[list[Path], Any]
"""A stage's files, in the workplace, and its notes."""
_ENTRY = "entry.json"
_FILES = "files"


class SharedStages:
    """A folder of finished stages."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def turn(self, stage: str, key: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Waits until no other process makes the same stage."""
        return in_turn(self._root / "turns" / self._name(stage, key))

    def take(self, stage: str, key: Mapping[str, Any], work: Path) -> Finished | None:
        """Puts a finished stage's files into a workplace, where there are some."""
        place = self._root / self._name(stage, key)
        try:
            entry = StoreEntry.model_validate(read_json(place / _ENTRY))
        except (OSError, ValueError, UnsafeInputError):
            return None
        if not entry.holds(key_hash(key), (place / _FILES).joinpath):
            return None  # it is made again, and takes this one's place
        for name in sorted({Path(name).parts[0] for name in entry.files}):
            _place(place / _FILES / name, work / name)
        return [work / name for name in entry.files], entry.value

    def keep(
        self, stage: str, key: Mapping[str, Any], work: Path, files: Sequence[Path], notes: Any
    ) -> None:
        """Leaves a stage that was just finished for the others."""
        names = [path.relative_to(work).as_posix() for path in files]
        with staged_directory(self._root / self._name(stage, key)) as place:
            linked = [place / _FILES / name for name in names]
            for path, link in zip(files, linked, strict=True):
                _link(path, link)
            entry = StoreEntry.of(key_hash(key), place / _FILES, linked, notes)
            write_text(place / _ENTRY, entry.model_dump_json())

    def tidy(self) -> None:
        """Removes stages whose files no output folder holds any more, and half-kept ones.

        Nothing else may work in the folder.
        """
        for part in self._root.glob(".*"):  # left by a run that was killed
            remove_tree(part)
        for entry in self._root.glob(f"*/{_ENTRY}"):
            files = (path for path in (entry.parent / _FILES).rglob("*") if path.is_file())
            if not any(path.stat().st_nlink > 1 for path in files):
                remove_tree(entry.parent)
        remove_tree(self._root / "turns")

    def _name(self, stage: str, key: Mapping[str, Any]) -> str:
        return f"{stage}-{key_hash(key)[:32]}"


def take_or_make(
    root: Path | None,  # that folder; None shares nothing
    stage: str,
    key: Mapping[str, Any],
    work: Path,
    make: Callable[[], Finished],
) -> tuple[Finished, bool]:
    """What a stage gives, made by this run or by another that shares its folder of stages."""
    if root is None:
        return make(), True
    shared = SharedStages(root)
    with shared.turn(stage, key):
        result = shared.take(stage, key, work)
        if result is not None:
            return result, False
        made = make()
        shared.keep(stage, key, work, *made)
        return made, True


def _place(source: Path, final: Path) -> None:
    """Puts a file or folder in the place of whatever is there."""
    if source.is_dir():
        with staged_directory(final) as stage:
            for path in source.rglob("*"):
                if path.is_file():
                    _link(path, stage / path.relative_to(source))
        return
    part = final.with_name(f"{final.name}.part")
    part.unlink(missing_ok=True)
    _link(source, part)
    part.replace(final)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # no hard links here, or none between these folders
        shutil.copyfile(source, target)


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


def quantize_key(run: Run, settings: QuantizeSettings) -> Key:
    """Both graphs, how and by whom they are quantised, and the files that are looked at."""
    return {
        **run.sources(),
        "settings": asdict(settings) | {"gguf": None},
        "texts": [file_hash(text) for text in settings.calibration],
        "gguf": None if settings.gguf is None else file_hash(str(settings.gguf)),
        "versions": run.versions,
    }


def quantize(run: Run, settings: QuantizeSettings) -> tuple[list[Path], dict[str, str]]:
    """Quantises both models alike; what they were made from is noted."""
    files: list[Path] = []
    shared, work = run.request.shared, run.ledger.work
    for arm in ARMS:
        # What one quantised model depends on; the other doesn't matter to it.
        others = dict.fromkeys(other for other in ARMS if other != arm)
        key = {**quantize_key(run, settings), **others}
        make = partial(_quantize_arm, run, arm, settings)
        (made, _), now = take_or_make(shared, f"{QUANTIZE}-{arm}", key, work, make)
        if not now:
            run.progress.say(f"quantize: {arm}, shared, it was made from the same before")
        files += made
    return files, run.sources()


def _quantize_arm(run: Run, arm: str, settings: QuantizeSettings) -> Finished:
    """One model's files."""
    source, folder = run.ledger.path(arm), run.ledger.work / QUANTIZED[arm]
    with staged_directory(folder) as stage:
        run.ledger.copy(ARMS[arm], arm, stage, leave_out=WRITTEN_ANEW)
        graph, progress = stage / _GRAPH, run.progress
        result = quantize_file(source / _GRAPH, graph, settings, progress=progress)
        write_graph_use(graph)
    run.progress.say(f"quantize: {arm}, {_sizes(result)}, {_bits(result)}")
    if result.difference.is_far:
        run.progress.say(f"quantize: {arm} gives answers far from the float model's")
    return files_below(folder), None


def _sizes(result: QuantizationResult) -> str:
    return f"{result.bytes_before / 1e6:,.1f} -> {result.bytes_after / 1e6:,.1f} MB"


def _bits(result: QuantizationResult) -> str:
    counts = result.record.bits.items()
    return ", ".join(f"{count} products of {width} bits" for width, count in counts)
