"""What an output folder already holds, and from what: the memory of `depthcut export`.

New results are made in a workplace inside the output folder and published together at the end, so
that the folder never mixes two runs. A run that is cut short leaves its finished stages in the
workplace, where the next one finds them.

A stage is valid when it was made from the same inputs (its key) and its files are unchanged.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from exporter.errors import UsageError
from exporter.files import sha256_bytes, sha256_file, swap, write_text

FOLDER = ".depthcut"
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[^.]+\.(?P<end>part|old)")


class StageLedger:
    """The stages that were finished in an output folder.

    Args:
        root: The output folder.
        force: When true, nothing is valid and every stage runs again.

    Attributes:
        work: The workplace, where a stage writes its files.
    """

    def __init__(self, root: Path, *, force: bool = False) -> None:
        self._root = root
        self._path = root / FOLDER / "stages.json"
        self._force = force
        self._made: set[str] = set()
        self._stale: set[str] = set()
        self._forgotten: dict[str, tuple[str, ...]] = {}
        self._stages: dict[str, dict[str, Any]] = _read_stages(self._path)
        self.work = root / FOLDER / "work"

    @property
    def is_new(self) -> bool:
        """True when depthcut has never finished a stage here."""
        return not self._path.exists()

    def path(self, name: str) -> Path:
        """Where a result is now: in the workplace when newly made, else in the output folder."""
        new = self.work / name
        return new if new.exists() else self._root / name

    def valid(self, stage: str, key: Mapping[str, Any]) -> bool:
        """Tells whether a stage was made from this key and its files are as they were."""
        entry = self._stages.get(stage)
        forced = self._force and stage not in self._made
        if forced or entry is None or entry["key"] != key_hash(key):
            return False
        files: dict[str, str] = entry["files"]
        return all(self._unchanged(name, sha256) for name, sha256 in files.items())

    def _unchanged(self, name: str, sha256: str) -> bool:
        path = self.path(name)
        return path.is_file() and sha256_file(path) == sha256

    def record(
        self, stage: str, key: Mapping[str, Any], files: Sequence[Path], notes: Any = None
    ) -> None:
        """Writes down that a stage is finished, with its files' hashes and its notes.

        Args:
            stage: Its name.
            key: Everything that it depends on.
            files: What it wrote, in the workplace.
            notes: What a later stage wants to know of it; JSON.
        """
        hashes = {path.relative_to(self.work).as_posix(): sha256_file(path) for path in files}
        self._made.add(stage)
        self._stale.update(self._stages.get(stage, {"files": {}})["files"])
        self._stages[stage] = {"key": key_hash(key), "files": hashes, "notes": notes}
        self._write()

    def _write(self) -> None:
        write_text(self._path, json.dumps(self._stages, indent=1, sort_keys=True) + "\n")

    def has(self, stage: str) -> bool:
        """Whether a stage was ever finished here."""
        return stage in self._stages

    def forget(self, stage: str, *results: str) -> None:
        """Lets a stage and its files and folders go when the others are published."""
        self._forgotten[stage] = results

    def notes(self, stage: str) -> Any:
        """What was noted when the stage was finished."""
        return self._stages[stage]["notes"]

    def files_hash(self, stage: str) -> str:
        """One hash over the stage's files: the key of whatever is made from them."""
        return key_hash(self._stages[stage]["files"])

    def publish(self) -> None:
        """Moves what is new from the workplace to the output folder, and removes what is gone."""
        if self.work.is_dir():
            for item in sorted(self.work.iterdir()):
                swap(item, self._root / item.name)
            shutil.rmtree(self.work)
        self._remove_stale()
        for stage, names in self._forgotten.items():
            for name in names:
                if (self._root / name).is_file():
                    (self._root / name).unlink()
                shutil.rmtree(self._root / name, ignore_errors=True)
            del self._stages[stage]
            self._write()

    def _remove_stale(self) -> None:
        """Removes files that a stage made in an earlier run, and no stage in this one."""
        kept = {name for entry in self._stages.values() for name in entry["files"]}
        for name in self._stale - kept:
            (self._root / name).unlink(missing_ok=True)
        self._stale.clear()


def key_hash(key: Mapping[str, Any]) -> str:
    """The hash of everything that a stage depends on."""
    return sha256_bytes(json.dumps(key, sort_keys=True, default=str).encode())


def _read_stages(path: Path) -> dict[str, dict[str, Any]]:
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # No memory, or a broken one: everything is made again.
        return {}
    if not isinstance(stages, dict):
        return {}
    wanted = {"key", "files", "notes"}
    return {
        name: entry
        for name, entry in stages.items()
        if isinstance(entry, dict) and entry.keys() == wanted and isinstance(entry["files"], dict)
    }


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keeps a second run out of an output folder for as long as the block runs.

    What a killed run left half-made is cleared away first. The lock leaves nothing behind: a block
    that made nothing leaves the disk as it was, without the folders that were made for it.

    Raises:
        UsageError: When another process works in the folder.
    """
    made = [path for path in (root, *root.parents) if not path.exists()]
    with _lock_alone(root) as lock:
        try:
            for place in (root, root / FOLDER, root / FOLDER / "work"):
                _clear_leftovers(place)
            yield
        finally:
            Path(lock.name).unlink(missing_ok=True)
            _remove_empty(root / FOLDER / "work", root / FOLDER, *made)


def _lock_alone(root: Path) -> IO[str]:
    """The lock's file, locked; closing it lets it go."""
    while True:
        lock = _lock_file(root, "lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UsageError(
                f"Another depthcut works in {root}.", "Wait for it, or use another folder."
            ) from None
        if os.fstat(lock.fileno()).st_nlink:
            return lock
        lock.close()  # the run that held it removed it between our two calls


def _remove_empty(*folders: Path) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextmanager
def in_turn(root: Path) -> Iterator[None]:
    """Waits until no other process is in such a block for the same folder.

    For what is read, changed and written back in a moment; a run that has :func:`locked` the folder
    for an hour is not waited for.
    """
    with _lock_file(root, "turn") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lock_file(root: Path, name: str) -> IO[str]:
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / name).open("w")


def _clear_leftovers(folder: Path) -> None:
    """Removes half-made files and folders; puts an older one back whose successor never came."""
    for path in sorted(folder.glob(".*")):
        found = _LEFTOVER.fullmatch(path.name)
        if found is None:
            continue
        if found["end"] == "old" and not (folder / found["name"]).exists():
            path.replace(folder / found["name"])
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
