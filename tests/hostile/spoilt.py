"""A stranger's folder while it is being spoilt, and the register of the ways to do that."""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hostile.commands import Command
from tests.hostile.place import Place

_MOST = 64 << 20
Change = Callable[["Spoilt", random.Random], None]


@dataclass(frozen=True)
class Mutation:
    """A way to spoil a folder."""

    name: str
    kind: str
    apply: Change
    hostile: bool


KINDS: dict[str, list[Mutation]] = defaultdict(list)
"""All mutations, by their kind."""


def read(path: Path) -> bytes:
    """A file's content."""
    leads_out = path.is_symlink() and path.resolve().parent.name != "blobs"
    if leads_out or path.stat().st_size > _MOST:
        raise ValueError(path)
    return path.read_bytes()


def mutation(kind: str, *, hostile: bool = False) -> Callable[[Change], Change]:
    """Registers a function as a way to spoil a folder."""

    def register(change: Change) -> Change:
        KINDS[kind].append(Mutation(change.__name__, kind, change, hostile))
        return change

    return register


@dataclass
class Spoilt:
    """A stranger's folder."""

    place: Place
    folder: Path
    command: Command
    done: list[Mutation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changing: list[str] = field(default_factory=list)
    meanwhile: Callable[[], None] | None = None

    @property
    def must_be_refused(self) -> bool:
        """Whether a failure must be told as a refusal of hostile input."""
        seen = [m for m in self.done if m.kind != "prepared output" or self.command.results]
        all_seen = bool(self.done) and len(seen) == len(self.done) and not self.command.fails
        return all_seen and all(m.hostile for m in seen)

    def note(self, text: object) -> None:
        """Says what was done."""
        self.notes.append(str(text)[:200])

    def files(self, *suffixes: str) -> list[Path]:
        """The folder's files, by their names; all, or those with these endings."""
        result = [path for path in self.folder.iterdir() if path.is_file()]
        return sorted(path for path in result if not suffixes or path.suffix in suffixes)

    def write(self, name: str, told: bytes | str) -> Path:
        """Writes a file of the folder; a link into blobs becomes a plain file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and not path.is_dir():
            path.unlink()
        path.write_bytes(told.encode("utf-8", "surrogatepass") if isinstance(told, str) else told)
        return path

    def put_json(self, name: str, told: Any) -> None:
        """Writes JSON; numbers may be none that JSON knows."""
        self.write(name, json.dumps(told))

    def json(self, name: str) -> Any:
        """A JSON file of the folder; an empty object where there is none."""
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            return json.loads(read(path))
        except ValueError:
            return {}

    def change(self, name: str, key: str, value: Any) -> None:
        """Sets an entry of a JSON file."""
        result = self.json(name)
        self.put_json(name, {**(result if isinstance(result, dict) else {}), key: value})
        self.note(f"{name}: {key}={str(value)[:80]!r}")
