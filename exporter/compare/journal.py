"""What a comparison has timed so far, on disk: a run that is killed goes on from there.

A chunk of rounds is kept whole or not at all. Chunks are loads of their own anyway, so that some of
an earlier process are worth as much as those of this one, under the same key: the same files,
options, libraries and machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.ledger import FOLDER, key_hash

if TYPE_CHECKING:
    from exporter.measure.timing.chunk import Chunk
    from exporter.measure.timing.probe import Cell

_NAME = "timing.jsonl"


class Journal:
    """Chunks by cell and number; see ``timing.chunk.Memory``.

    Args:
        root: The output folder.
        key: Everything that times depend on. What was kept under another key is thrown away.
    """

    def __init__(self, root: Path, key: Mapping[str, Any]) -> None:
        self._path = root / FOLDER / _NAME
        self._head = {"key": key_hash(key)}
        self._chunks = self._read()
        self._write([self._head, *self._chunks.values()])

    @property
    def chunks(self) -> int:
        """How many it brought along."""
        return len(self._chunks)

    def recall(self, cell: Cell, number: int) -> Chunk | None:
        """The chunk of a cell, where it was finished."""
        from exporter.measure.timing.chunk import Chunk

        entry = self._chunks.get(_name(cell, number))
        return None if entry is None else Chunk.from_json(entry["chunk"])

    def keep(self, cell: Cell, number: int, chunk: Chunk) -> None:
        """Writes a finished chunk down, and through to the disk."""
        entry = {"name": _name(cell, number), "chunk": chunk.to_json()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> dict[str, dict[str, Any]]:
        from exporter.measure.timing.chunk import Chunk

        found: dict[str, dict[str, Any]] = {}
        try:
            head, *lines = self._path.read_text(encoding="utf-8").splitlines()
            if json.loads(head) != self._head:
                return {}
            for line in lines:
                entry = json.loads(line)
                Chunk.from_json(entry["chunk"])
                found[entry["name"]] = entry
        except (OSError, ValueError, KeyError, TypeError):
            # Nothing is there, or the last line was cut off: what stands before it is whole.
            return found
        return found

    def _write(self, entries: list[dict[str, Any]]) -> None:
        from exporter.files import write_text

        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, "".join(json.dumps(entry) + "\n" for entry in entries))


def forget(root: Path) -> None:
    """Removes what was kept: the report is written."""
    (root / FOLDER / _NAME).unlink(missing_ok=True)


def _name(cell: Cell, number: int) -> str:
    return f"{cell} #{number}"
