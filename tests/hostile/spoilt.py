"""A stranger's folder while it is being spoilt, and the register of the ways to do that."""

from __future__ import annotations

import copy
import json
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hostile.commands import Command
from tests.hostile.place import Place

_MOST = 64 << 20
ACTIVE = ("\n::error::x", "\x1b]0;title\x07", "\x1b[2J", "\u202e", "\x9b31m", "##[error]", "\r",
"\x00", "\u2028", "\ud800", "##vso[task.setvariable]x")  # fmt: skip
"""What terminals and CI systems act on."""
NUMBERS: list[Any] = [10**9, 2**31, 2**63, 2**64, 10**30, 10**400, -1, 0, 1, 1.5, float("nan"),
float("inf"), float("-inf"), -(10**9), 1e300, 5e-324, 4096]  # fmt: skip
ODD: list[Any] = [*NUMBERS, "7", "", None, [], {}, True, [1] * 50, {"a": {"b": []}}, "x" * 5000,
[[]], "1e9", "9" * 5_000, "../beside/secret.txt", "/etc/hostname", "attacker/model", "<script>",
"![x](http://attacker/x)", "=cmd()", "%d%d%s", *ACTIVE]  # fmt: skip
"""Values of every type."""
ELSEWHERE = ("../beside/evil/model.safetensors", "/etc/hostname", "/dev/zero",
"../beside/secret.txt", "../victim/mine.txt")  # fmt: skip
"""What no file of a model may name."""


@dataclass(frozen=True)
class Mutation:
    """A way to spoil a folder."""

    name: str
    kind: str
    apply: Callable[[Spoilt, random.Random], None]
    hostile: bool


Change = Callable[["Spoilt", random.Random], None]
KINDS: dict[str, list[Mutation]] = defaultdict(list)
"""All mutations, by their kind."""


def mutation(kind: str, *, hostile: bool = False) -> Callable[[Change], Change]:
    """Registers a function as a way to spoil a folder."""

    def register(change: Change) -> Change:
        KINDS[kind].append(Mutation(change.__name__, kind, change, hostile))
        return change

    return register


def values(keys: Iterable[str], choices: Iterable[Any]) -> list[dict[str, Any]]:
    """Each key with each value."""
    every = list(choices)
    return [{key: value} for key in keys for value in every]


def entries(
    kind: str, files: Sequence[str], changes: Sequence[Mapping[str, Any]], *, hostile: bool = False
) -> None:
    """Registers: in one of some JSON files stands one of some sets of entries, mostly on top."""

    @mutation(kind, hostile=hostile)
    def entry(spoilt: Spoilt, rng: random.Random) -> None:
        file, change = rng.choice(files), rng.choice(changes)
        if kind == "config entries" and rng.random() < 0.3:
            key = rng.choice(("text_config", "vision_config", "x", "id2label", "rope_scaling"))
            change = {key: rng.choice((change, [change], {"y": [change]}))}
        for key, value in change.items():
            spoilt.change(file, key, value)


def contents(kind: str, files: Sequence[str], texts: Sequence[bytes | str]) -> None:
    """Registers: a file holds one of some texts; without names it is one of the JSON files."""

    @mutation(kind)
    def content(spoilt: Spoilt, rng: random.Random) -> None:
        there = [path.name for path in spoilt.files(".json")] or ["config.json"]
        name, text = rng.choice(files or there), rng.choice(texts)
        spoilt.note(f"{name}: {text[:60]!r}")
        spoilt.write(name, text)


def spots_of(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value."""
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from spots_of(content[key])


def odd_values(content: Any, rng: random.Random, note: Callable[[object], None]) -> Any:
    """The same with values, keys or holes that no file of ours has."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not (spots := list(spots_of(content))):
            break
        holder, key = rng.choice(spots)
        value, how = holder[key], rng.random()
        note(f"{str(key)[:40]}: {how:.1f}")
        if how < 0.8 or isinstance(holder, list):
            holder[key] = copy.deepcopy(rng.choice(ODD))  # which may be spoilt, too
        else:
            del holder[key]
            if how < 0.9:
                holder[f"{key}{rng.choice(ACTIVE)}"] = value
    return content


def odd_json(kind: str, *files: str) -> None:
    """Registers: anything stands anywhere in a JSON file, which is one of the folder's if no name
    is given."""

    @mutation(kind)
    def odd(spoilt: Spoilt, rng: random.Random) -> None:
        name = rng.choice(files) if files else rng.choice(spoilt.files(".json")).name
        spoilt.note(name)
        spoilt.put_json(name, odd_values(spoilt.json(name), rng, spoilt.note))


def read(path: Path) -> bytes:
    """A file's content."""
    leads_out = path.is_symlink() and path.resolve().parent.name != "blobs"
    if leads_out or path.stat().st_size > _MOST:
        raise ValueError(path)
    return path.read_bytes()


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
        self.notes.append(ascii(str(text))[1:-1][:200])

    def files(self, *suffixes: str) -> list[Path]:
        """The folder's files, by their names; all, or those with these endings."""
        result = [path for path in self.folder.iterdir() if path.is_file()]
        return sorted(path for path in result if not suffixes or path.suffix in suffixes)

    def write(self, name: str, content: bytes | str) -> Path:
        """Writes a file of the folder; a link into blobs becomes a plain file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and not path.is_dir():
            path.unlink()
        text = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        path.write_bytes(text)
        return path

    def put_json(self, name: str, content: Any) -> None:
        """Writes JSON; numbers may be none that JSON knows."""
        self.write(name, json.dumps(content))

    def json(self, name: str) -> Any:
        """A JSON file of the folder; an empty object where there is none."""
        path = self.folder / name
        try:
            return json.loads(read(path)) if path.is_file() else {}
        except ValueError:
            return {}

    def change(self, name: str, key: str, value: Any) -> None:
        """Sets an entry of a JSON file."""
        result = self.json(name)
        self.put_json(name, {**(result if isinstance(result, dict) else {}), key: value})
        self.note(f"{name}: {key}={str(value)[:80]!r}")
