"""What an output folder already holds, and from what: the memory of `depthcut export`.

A stage is valid when it was made from the same inputs (its key) and its files are unchanged.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporter.errors import UsageError
from exporter.files import sha256_bytes, sha256_file, write_text

FOLDER = ".depthcut"


class StageLedger:
    """The stages that were finished in an output folder.

    Args:
        root: The output folder.
        force: When true, nothing is valid and every stage runs again.
    """

    def __init__(self, root: Path, *, force: bool = False) -> None:
        self._root = root
        self._path = root / FOLDER / "stages.json"
        self._force = force
        self._stages: dict[str, dict[str, Any]] = _read_stages(self._path)

    @property
    def is_new(self) -> bool:
        """True when no stage was ever finished here."""
        return not self._stages

    def valid(self, stage: str, key: Mapping[str, Any]) -> bool:
        """Tells whether a stage was made from this key and its files are as they were."""
        entry = self._stages.get(stage)
        if self._force or entry is None or entry["key"] != key_hash(key):
            return False
        files: dict[str, str] = entry["files"]
        return all(self._unchanged(name, sha256) for name, sha256 in files.items())

    def _unchanged(self, name: str, sha256: str) -> bool:
        path = self._root / name
        return path.is_file() and sha256_file(path) == sha256

    def record(
        self, stage: str, key: Mapping[str, Any], files: Sequence[Path], notes: Any = None
    ) -> None:
        """Writes down that a stage is finished, with its files' hashes and its notes."""
        hashes = {path.relative_to(self._root).as_posix(): sha256_file(path) for path in files}
        self._stages[stage] = {"key": key_hash(key), "files": hashes, "notes": notes}
        write_text(self._path, json.dumps(self._stages, indent=1, sort_keys=True) + "\n")

    def notes(self, stage: str) -> Any:
        """What was noted when the stage was finished."""
        return self._stages[stage]["notes"]

    def files_hash(self, stage: str) -> str:
        """One hash over the stage's files: the key of whatever is made from them."""
        return key_hash(self._stages[stage]["files"])


def key_hash(key: Mapping[str, Any]) -> str:
    """The hash of everything that a stage depends on."""
    return sha256_bytes(json.dumps(key, sort_keys=True, default=str).encode())


def _read_stages(path: Path) -> dict[str, dict[str, Any]]:
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # No memory, or a broken one: everything is made again.
        return {}
    return stages if isinstance(stages, dict) else {}


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keeps a second run out of an output folder for as long as the block runs.

    Raises:
        UsageError: When another process works in the folder.
    """
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"Another depthcut works in {root}.", "Wait for it, or use another folder."
            ) from None
        yield
