"""The steps of a record: taken together, undone together, or taken up again after a kill."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from graph_passes.errors import InterruptedResultError
from graph_passes.files.exchange import can_exchange, identity, put, settle, sync_names, take_back
from graph_passes.files.record import RECORD, Change, ChangeRecord, base_of

GONE = "gone"
"""Where files that were removed are until all steps are taken."""


def gone_of(home: Path) -> Path:
    """That place in a folder of ours."""
    return home / GONE


def is_one_step(home: Path, record: ChangeRecord) -> bool:
    """Whether all is done by one call of the system, so that no record is needed."""
    alone = len(record.changes) + len(record.removals) == 1
    replaces = any(change.old is not None for change in record.changes)
    return alone and (not replaces or can_exchange(gone_of(home)))


def is_undone(record: ChangeRecord) -> bool:
    """Whether all is as it was before the first step."""
    return all(identity(path) == before for path, before in record.before)


def close(home: Path, record: ChangeRecord) -> None:
    """Removes what was replaced, then the record, so that nobody takes the one for the new."""
    for change in record.changes:
        if change.staged.is_dir() and not change.staged.is_symlink():
            shutil.rmtree(change.staged, ignore_errors=True)
        else:
            change.staged.unlink(missing_ok=True)
    for removal in record.removals:
        _remove_emptied(removal.final.parent, base_of(home))
    (home / RECORD).unlink(missing_ok=True)


def _remove_emptied(folder: Path, base: Path) -> None:
    """Removes the folders that nothing is left in, from one on up to where the results stand."""
    while folder != base and folder.is_relative_to(base):
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def carry_out(home: Path, record: ChangeRecord) -> None:
    """Takes every step, or, when one fails, none."""
    with contextlib.ExitStack() as undo:
        for change in record.changes:
            was_there = os.path.lexists(change.final)
            undo.callback(_take_back, change, was_there=was_there)
            put(change.staged, change.final)
        for number, removal in enumerate(record.removals):
            gone = gone_of(home) / str(number)
            gone.parent.mkdir(exist_ok=True)
            removal.final.rename(gone)
            undo.callback(gone.rename, removal.final)
        for folder in record.folders:
            sync_names(folder)
        undo.pop_all()


def _take_back(change: Change, *, was_there: bool) -> None:
    half_taken = was_there and not os.path.lexists(change.final)
    if half_taken or identity(change.final) == change.new:  # else the step was not taken
        take_back(change.staged, change.final, was_there=was_there)


def carry_on(home: Path, record: ChangeRecord) -> None:
    """Takes every step that is left: a user's files go over into a folder even where one can't."""
    spoiled = [change.final for change in record.changes if not _completed(change)]
    if spoiled:
        raise InterruptedResultError(
            f"{spoiled[0]} belongs to a result that was cut off while its files took their places, "
            "and has been changed since.",
            "Run the command that wrote it again.",
        )
    for number, removal in enumerate(record.removals):
        if removal.old is not None and identity(removal.final) == removal.old:
            gone_of(home).mkdir(exist_ok=True)
            removal.final.rename(gone_of(home) / str(number))
    for folder in record.folders:
        sync_names(folder)
    close(home, record)


def _completed(change: Change) -> bool:
    """Takes a step that was not taken yet; whether it is taken now."""
    there = identity(change.final)
    if there != change.new:
        if identity(change.staged) != change.new or there not in (change.old, None):
            return False
        put(change.staged, change.final)
    settle(change.staged)
    return True
