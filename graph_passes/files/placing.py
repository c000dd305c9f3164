"""Several files that take their places together, or none of them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

_NAME_PART = 40  # how much of the target's name a staging folder's name shows


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Gives an empty folder beside ``target``; it is gone when the block ends, however it ends.

    Folders above ``target`` that are made for this go again when the block raises.
    """
    made = [folder for folder in target.parents if not folder.exists()]
    # The name is known before the folder is there, so that no moment exists to leave it behind.
    stage = target.with_name(f".{target.name[:_NAME_PART]}.{secrets.token_hex(8)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir(mode=0o700)
        yield stage
        shutil.rmtree(stage, ignore_errors=True)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def place(moves: Sequence[tuple[Path, Path]], removals: Sequence[tuple[Path, Path]] = ()) -> None:
    """Moves finished files to their final names; all is as before if any step fails.

    Args:
        moves: Staged file and final name, in the order in which they are to appear. The staged
            file's folder is on the same file system; it keeps the earlier file meanwhile.
        removals: Files that go at the end, and the staging folders that keep them meanwhile.
    """
    for staged, _ in moves:
        _sync(staged)
    with contextlib.ExitStack() as undo:
        for staged, final in moves:
            earlier = staged.with_name(f"{staged.name}.earlier")
            if os.path.lexists(final):
                _keep(final, earlier)
            undo.callback(_put_back, earlier, final)
            staged.replace(final)
        for final, stage in removals:
            undo.callback(_restore, stage / f"{final.name}.removed", final)
            final.replace(stage / f"{final.name}.removed")
        for folder in {final.parent for _, final in moves}:
            _sync(folder)
        undo.pop_all()


def _keep(final: Path, earlier: Path) -> None:
    """A second name for the earlier file, so that at no moment there is none."""
    try:
        earlier.hardlink_to(final)
    except OSError:
        shutil.copy2(final, earlier, follow_symlinks=False)


def _put_back(earlier: Path, final: Path) -> None:
    if os.path.lexists(earlier):
        earlier.replace(final)
    else:
        final.unlink(missing_ok=True)


def _restore(removed: Path, final: Path) -> None:
    if os.path.lexists(removed):
        removed.replace(final)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
