"""Several files that take their places together, or none of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Gives an empty folder beside ``target``; it is gone when the block ends, however it ends.

    Folders above ``target`` that are made for this go again when the block raises.
    """
    made = _make_parents(target)
    try:
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _make_parents(target: Path) -> list[Path]:
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing


def place(stage: Path, moves: Sequence[tuple[Path, Path]]) -> None:
    """Moves finished files to their final names; earlier ones come back if any move fails.

    Args:
        stage: The staging folder, on the same file system; it keeps the earlier files meanwhile.
        moves: Staged file and final name, in the order in which they are to appear.
    """
    for staged, _ in moves:
        _sync(staged)
    done: list[tuple[Path, Path]] = []
    try:
        for i, (staged, final) in enumerate(moves):
            earlier = stage / f"{i}.earlier"
            if final.exists():
                _keep(final, earlier)
            done.append((final, earlier))
            staged.replace(final)
    except BaseException:
        for final, earlier in reversed(done):
            if earlier.exists():
                earlier.replace(final)
            else:
                final.unlink(missing_ok=True)
        raise
    for folder in {final.parent for _, final in moves}:
        _sync(folder)


def _keep(final: Path, earlier: Path) -> None:
    """A second name for the earlier file, so that at no moment there is none."""
    try:
        earlier.hardlink_to(final)
    except OSError:
        shutil.copy2(final, earlier)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
