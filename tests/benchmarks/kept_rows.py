"""What a benchmark has finished, a file a row, so that an interrupted run goes on from there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from exporter.files import sha256_bytes, write_text


class Named(Protocol):
    """A row of a table."""

    @property
    def name(self) -> str:
        """What it is called in the table and on the command line."""


RowT = TypeVar("RowT", bound=Named)


class KeptRows:
    """Finished rows in a folder."""

    def __init__(self, folder: Path, about: object) -> None:
        self._folder, self.key = folder, short_sha256(about)

    def path(self, name: str) -> Path:
        """Where a row is, or will be."""
        return self._folder / f"{self.key}-{short_sha256(name)}.json"

    def find(self, name: str) -> dict[str, Any] | None:
        """A finished row; None where it isn't there."""
        path = self.path(name)
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def keep(self, name: str, row: dict[str, Any]) -> None:
        """Keeps a finished row."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self.path(name), json.dumps(row) + "\n")


def wanted(table: Iterable[RowT], only: Sequence[str]) -> list[RowT]:
    """For each text the row of that name; where there is none, those whose name has the text."""
    rows = list(table)
    named = {row.name for row in rows} & set(only)
    parts = [text for text in only if text not in named]
    return [
        row
        for row in rows
        if not only or row.name in named or any(text in row.name for text in parts)
    ]


def short_sha256(content: object) -> str:
    """Twelve digits of the hash of plain data."""
    return sha256_bytes(json.dumps(content).encode())[:12]
