"""Finished stages that the output folders of one sweep have in common.

A stage stands under the hash of everything that it depends on. Its files are hard links of those in
the output folders, so that ten cells of one model hold its weights once; results are never changed
in place. Where there are no hard links, they are copies.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from exporter.artifacts.ledger import in_turn
from exporter.artifacts.store import StoreEntry, key_hash
from exporter.files import staged_directory, write_text
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
    """A folder of finished stages.

    Args:
        root: The folder; it need not exist.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def turn(self, stage: str, key: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Waits until no other process makes the same stage."""
        return in_turn(self._root / "turns" / self._name(stage, key))

    def take(self, stage: str, key: Mapping[str, Any], work: Path) -> Finished | None:
        """Puts a finished stage's files into a workplace, where there are some.

        Args:
            stage: Its name.
            key: Everything that it depends on.
            work: The workplace.

        Returns:
            The files there and the stage's notes; None where it isn't there, whole.
        """
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
        """Leaves a stage that was just finished for the others.

        Args:
            stage: Its name.
            key: Everything that it depends on.
            work: The workplace.
            files: What it wrote there.
            notes: What a later stage wants to know of it; JSON.
        """
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
    root: Path | None,
    stage: str,
    key: Mapping[str, Any],
    work: Path,
    make: Callable[[], Finished],
) -> tuple[Finished, bool]:
    """What a stage gives, made by this run or by another that shares its folder of stages.

    Args:
        root: That folder; None shares nothing.
        stage: Its name.
        key: Everything that it depends on.
        work: The workplace, where it leaves its files.
        make: Makes it.

    Returns:
        Its files and notes, and whether they were made now.
    """
    if root is None:
        return make(), True
    shared = SharedStages(root)
    with shared.turn(stage, key):
        found = shared.take(stage, key, work)
        if found is not None:
            return found, False
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
