"""The one door through which results appear, change and go: all files of a result, or none."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from graph_passes.errors import (
    DepthcutError,
    InterruptedResultError,
    PreparedFolderError,
    TargetInUseError,
    UsageError,
)
from graph_passes.files.exchange import absolute, identity, sync
from graph_passes.files.kinds import kind_of, refuse_foreign
from graph_passes.files.locations import real
from graph_passes.files.locking import FOLDER, MOMENT_S, held, is_free, prepared, refuse_links
from graph_passes.files.record import (
    GONE,
    RECORD,
    Change,
    ChangeRecord,
    Removal,
    carry_on,
    carry_out,
    close,
    is_one_step,
    is_undone,
    read_record,
)

SCRATCH = "scratch"
"""What of the kept folder is of no use to the next run."""

RESULTS = "results"
"""What of a folder of ours has locks of its own, one a target."""

_NEW, _KEPT = "new", "kept"
_LEVELS = 4  # an engine stands in <out>/engines/candidate/
_READER_WAITS_S = 20.0


@dataclass(frozen=True)
class Staging:
    """Where a result is made before it takes its place."""

    target: Path
    home: Path

    @property
    def folder(self) -> Path:
        """Where the new files are made; empty at first, gone at the end."""
        return self.home / _NEW

    @property
    def kept(self) -> Path:
        """Where an interrupted run leaves what the next one goes on with; nobody else clears it."""
        return self.home / _KEPT

    def place(
        self, moves: Sequence[tuple[Path, Path]] | None = None, removals: Sequence[Path] = ()
    ) -> None:
        """Moves finished files and folders to their final names; all or nothing."""
        place(self.home, [(self.folder, self.target)] if moves is None else moves, removals)


@contextlib.contextmanager
def staging(target: Path, *, wait_s: float = MOMENT_S) -> Iterator[Staging]:
    """Gives an empty folder for a result, under the target's lock.

    Folders above ``target`` that are made for this go again when nothing was placed in them.
    """
    home = home_of(target)
    with held(home, target, wait_s=wait_s):
        _prepare(home)
        stage, unfinishable = Staging(target, home), identity(home / RECORD)
        try:
            stage.folder.mkdir()
            yield stage
        finally:
            if unfinishable is not None and identity(home / RECORD) == unfinishable:
                _remove_made(home)  # of no use to that record
            _clear(home)


@contextlib.contextmanager
def working(target: Path, *, forget: bool = True) -> Iterator[Path]:
    """Holds a target's lock for a long command that writes it in the end."""
    home = home_of(target)
    with held(home, target):
        _prepare(home)
        kept = home / _KEPT
        remove_tree(kept / SCRATCH)
        yield kept
        if forget:
            remove_tree(kept)


def _prepare(home: Path) -> None:
    """Completes or clears away what killed processes left; what the next one reads is looked at."""
    _clear_all(home.parent, apart_from=home)
    complete(home, overwriting=True)
    _clear(home)
    refuse_links(home)
    _clear_all(home / _KEPT / FOLDER / RESULTS)


def home_of(target: Path) -> Path:
    """The folder of ours for a target that is replaced as a whole."""
    at = absolute(target)
    if at.name == FOLDER:
        raise UsageError(
            f"{target} is the name of the folder that depthcut works in.", "Use another name."
        )
    return at.parent / FOLDER / RESULTS / at.name


def place(
    home: Path,
    moves: Sequence[tuple[Path, Path]],
    removals: Sequence[Path] = (),
    others: Sequence[tuple[Path, Path]] = (),
) -> None:
    """As :meth:`Staging.place`, for a folder of ours whose lock the caller holds."""
    for staged, final in moves:
        refuse_foreign(final, kind_of(staged))
    for staged, _ in moves:
        sync(staged)
    record = ChangeRecord(
        [Change(staged, final, identity(staged), identity(final)) for staged, final in moves]
        + [Change(staged, final, identity(final), identity(final)) for staged, final in others],
        [Removal(final, identity(final)) for final in removals],
    )
    mixed = is_pending(home)  # what is there was cut off, and can't be completed
    try:
        if not is_one_step(home, record):
            record.write(home)
        carry_out(home, record)
    except BaseException:
        if not mixed and is_undone(record):
            (home / RECORD).unlink(missing_ok=True)
        raise
    close(home, record)


def is_pending(home: Path) -> bool:
    """Whether a folder of ours holds a record of changes that are not complete."""
    return os.path.lexists(home / RECORD)


def finish_interrupted(path: Path) -> None:
    """Completes results that a killed process has left half in their places, for a reader."""
    at = absolute(path)
    for folder in (at, *at.parents)[: _LEVELS + 1]:
        ours = folder / FOLDER
        if not os.path.lexists(ours):
            continue
        for home in (ours, *sorted((ours / RESULTS).glob("*"))):
            if is_pending(home):
                _finish(home, folder)


def _finish(home: Path, folder: Path) -> None:
    try:
        with held(home, folder, wait_s=_READER_WAITS_S):
            complete(home)
            _clear(home)
    except (OSError, TargetInUseError) as error:
        if is_pending(home):
            raise InterruptedResultError(
                f"{folder} holds a result that was cut off while its files took their places, and "
                f"it can't be completed here: {str(error).rstrip('.')}.",
                "Run the command that wrote it again.",
            ) from error


def complete(home: Path, *, overwriting: bool = False) -> None:
    """Carries out what is left of a record, under the lock of its folder."""
    if not is_pending(home):
        return
    if (home / RECORD).is_dir():
        raise prepared(home / RECORD, home)
    try:
        carry_on(home, read_record(home))
    except (InterruptedResultError, OSError):
        if not overwriting:
            raise
        _remove_made(home)


def _clear_all(results: Path, apart_from: Path | None = None) -> None:
    """Completes and removes what killed processes left for the targets of a folder."""
    for home in sorted(results.glob("*")):
        with contextlib.suppress(DepthcutError, OSError):
            wanted = home == apart_from or home.is_symlink() or [*home.iterdir()] == [home / _KEPT]
            if not wanted and is_free(home):
                with held(home, home, wait_s=0):
                    complete(home)
                    _clear(home)
    for folder in (results, results.parent):  # where a killed run had only begun or all but ended
        with contextlib.suppress(OSError):
            folder.rmdir()


def _clear(home: Path) -> None:
    """Removes what was made or replaced; ``kept`` stays, and what a record still needs."""
    if is_pending(home):
        return
    _remove_made(home)
    with contextlib.suppress(OSError):
        (home / RECORD).with_suffix(".part").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (home / _KEPT).rmdir()


def _remove_made(home: Path) -> None:
    for name in (_NEW, GONE):
        shutil.rmtree(home / name, ignore_errors=True)  # follows no links


def refuse_outside(root: Path, path: Path) -> None:
    """Refuses a place below an output folder that links lead out of it."""
    if not real(path).is_relative_to(real(root)):
        raise PreparedFolderError(
            f"{path} is reached by a link that leads out of {root}.",
            "Use another output folder.",
        )


def append(path: Path, text: str) -> None:
    """Adds to a file in a folder of ours, through to the disk."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path, flags, 0o666)
    try:
        data = memoryview(text.encode())
        while data:
            data = data[os.write(handle, data) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_tree(folder: Path) -> None:
    """Removes a folder of ours with all that is in it, links in it not followed."""
    if FOLDER not in folder.parts:
        raise ValueError(f"{folder} is not in a folder of ours")
    refuse_links(folder, within=False)
    shutil.rmtree(folder, ignore_errors=True)
