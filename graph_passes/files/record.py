"""What is about to change when a result takes its place: on disk, and step by step."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graph_passes.errors import InterruptedResultError, UnsafeInputError
from graph_passes.files.exchange import (
    Identity,
    absolute,
    can_exchange,
    identity,
    put,
    settle,
    sync,
    sync_names,
    take_back,
)
from graph_passes.files.locking import FOLDER, refuse_other_users
from graph_passes.files.reading import read_json

RECORD = "changing.json"


@dataclass(frozen=True)
class Change:
    """A staged file or folder, and the place that it takes."""

    staged: Path
    final: Path
    new: Identity | None
    old: Identity | None  # None where there was none


@dataclass(frozen=True)
class Removal:
    """A file that goes when the others are in their places."""

    final: Path
    old: Identity | None


@dataclass(frozen=True)
class ChangeRecord:
    """The changes of one result, in their order."""

    changes: list[Change]
    removals: list[Removal]

    @property
    def before(self) -> list[tuple[Path, Identity | None]]:
        """Every place, and what tells what was there before."""
        changed = [(change.final, change.old) for change in self.changes]
        return changed + [(removal.final, removal.old) for removal in self.removals]

    def write(self, home: Path) -> None:
        """Writes it down, through to the disk; it is there whole or not at all."""
        text = json.dumps(
            {
                "changes": [
                    {**_names(home, c.staged, c.final), "new": c.new, "old": c.old}
                    for c in self.changes
                ],
                "removals": [{**_names(home, None, r.final), "old": r.old} for r in self.removals],
            }
        )
        part = (home / RECORD).with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        sync(part)
        part.rename(home / RECORD)
        sync_names(home)


def read_record(home: Path) -> ChangeRecord:
    """Reads a record, and checks every name and number in it."""
    refuse_other_users(home / RECORD, home)
    try:
        result = read_json(home / RECORD)
        changes = [
            Change(
                *_changed_path(home, entry),
                _identity(entry["new"]),
                None if entry["old"] is None else _identity(entry["old"]),
            )
            for entry in result["changes"]
        ]
        removals = [
            Removal(_path(home, e["final"]), None if e["old"] is None else _identity(e["old"]))
            for e in result["removals"]
        ]
    except (OSError, ValueError, KeyError, TypeError, UnsafeInputError) as error:
        raise InterruptedResultError(
            f"{home / RECORD} is not a record that depthcut wrote here.",
            "Run the command that wrote the result again.",
        ) from error
    return ChangeRecord(changes, removals)


def base_of(home: Path) -> Path:
    """The folder that the results stand in: the one above the innermost folder of ours."""
    return next(path.parent for path in (home, *home.parents) if path.name == FOLDER)


def _names(home: Path, staged: Path | None, final: Path) -> dict[str, str]:
    base = base_of(home)
    named = {"final": _relative(final, base)}
    return named if staged is None else {"staged": _relative(staged, base), **named}


def _relative(path: Path, base: Path) -> str:
    at, base = absolute(path), absolute(base)
    return (at.relative_to(base) if at.is_relative_to(base) else at).as_posix()


def _changed_path(home: Path, entry: dict[str, Any]) -> tuple[Path, Path]:
    """Where a file was made, and its place.

    A report may stand in another folder than its model. Its record names both by absolute paths,
    and the staged file must be in the folder of ours beside its place.
    """
    if FOLDER not in Path(entry["staged"]).parts or "\0" in entry["final"]:
        raise ValueError(entry["staged"])
    if not Path(entry["final"]).is_absolute():
        return _path(home, entry["staged"]), _path(home, entry["final"])
    final = Path(entry["final"])
    ours = final.parent / FOLDER
    return _path(ours, Path(entry["staged"]).relative_to(final.parent)), _path(ours, final.name)


def _path(home: Path, name: str | Path) -> Path:
    """A path below the folder that the results stand in, no part of it a link."""
    base, relative = base_of(home), Path(name)
    bad = relative.is_absolute() or not relative.parts or b"\0" in os.fsencode(relative)
    if bad or ".." in relative.parts:
        raise ValueError(name)
    for folder in (base / relative).parents:
        if folder != base and folder.is_relative_to(base) and folder.is_symlink():
            raise ValueError(name)
    return base / relative


def _identity(value: Any) -> Identity:
    plain = isinstance(value, list) and all(type(number) is int for number in value)
    if not plain or len(value) not in (1, 3):
        raise TypeError(value)
    return list(value)


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
        sync_folders(record)
        undo.pop_all()


def sync_folders(record: ChangeRecord) -> None:
    """Waits until all names that have changed are on the disk."""
    for folder in {path.parent for path, _ in record.before}:
        with contextlib.suppress(FileNotFoundError):  # one that was emptied, and has gone
            sync_names(folder)


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
    sync_folders(record)
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
