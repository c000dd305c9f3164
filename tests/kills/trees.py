"""What stands in a folder, and whether it is one result and not a mixture of two."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

OURS = ".depthcut"
_INPUTS = "in"

Tree = Mapping[str, str]
"""Name below the folder to what is there: the hash of a file, a link's target, or a folder."""

Pair = tuple[str, ...]
"""The hashes of a graph, and of each data file that it names."""


def tree(folder: Path) -> Tree:
    """Everything below a folder but the inputs."""
    lines: dict[str, str] = {}
    for place, folders, files in os.walk(folder):
        here = Path(place)
        if here == folder and _INPUTS in folders:
            folders.remove(_INPUTS)
        for name in files:
            lines[(here / name).relative_to(folder).as_posix()] = _content(here / name)
        if not folders and not files and here != folder:
            lines[here.relative_to(folder).as_posix() + "/"] = "an empty folder"
    return lines


def _content(path: Path) -> str:
    return f"-> {path.readlink()}" if path.is_symlink() else _sha256(path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shown(found: Tree) -> Tree:
    """Without what depthcut keeps for itself."""
    return {name: content for name, content in found.items() if OURS not in Path(name).parts}


def pairs(folder: Path) -> dict[str, Pair]:
    """Every graph below a folder, as onnxruntime would find it there."""
    results = {}
    for path in sorted(folder.rglob("*.onnx")):
        name = path.relative_to(folder)
        if path.is_file() and OURS not in name.parts and name.parts[0] != _INPUTS:
            results[name.as_posix()] = _pair(path)
    return results


def _pair(path: Path) -> Pair:
    content = path.read_bytes()
    hashes = [hashlib.sha256(content).hexdigest()]
    for location in _locations(content):
        data = path.parent / location
        if not data.is_file():
            raise ValueError(f"{path.name} names {location}, which is not there")
        hashes.append(_sha256(data))
    return tuple(hashes)


@functools.lru_cache(512)
def _locations(content: bytes) -> tuple[str, ...]:
    model = onnx.ModelProto.FromString(content)
    if not model.graph.node:
        raise ValueError("a graph is empty")
    entries = (entry for item in model.graph.initializer for entry in item.external_data)
    return tuple(sorted({entry.value for entry in entries if entry.key == "location"}))


@dataclass(frozen=True)
class Result:
    """What an undisturbed run leaves, as several of them have left it."""

    trees: list[Tree]
    texts: Mapping[str, bytes]
    sizes: list[int]
    pairs: set[Pair]
    may_vary: str = "$"

    @functools.cached_property
    def varying(self) -> set[str]:
        """The names of files that differ from run to run: they hold times."""
        return {
            name
            for name in self.trees[0]
            if len({item.get(name) for item in self.trees}) > 1 or re.match(self.may_vary, name)
        }

    def names(self, names: Iterable[str]) -> set[str]:
        """Those names that belong to it."""
        return self.trees[0].keys() & set(names)


def same_json(one: bytes, other: bytes) -> bool:
    """Whether two texts have the same fields and the same parents, whatever times they tell."""
    first, second = json.loads(one), json.loads(other)
    return bool(_fields(first) == _fields(second))


def _fields(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _fields(inner) for key, inner in value.items() if not key.startswith("cpu_")}
    if isinstance(value, list):
        return [_fields(value[0])] if value else []
    return None


def parents(text: bytes) -> set[str]:
    """The names of what a text says that it was made from."""
    content = json.loads(text)
    return set(content.get("made_from", ())) if isinstance(content, dict) else set()


def broken_promises(folder: Path) -> Iterator[str]:
    """Files that a memory of finished stages says are published, and that are others."""
    for path in folder.rglob(f"{OURS}/stages.json"):
        root = path.parents[1]
        if OURS in root.relative_to(folder).parts:
            continue
        for name, sha256 in json.loads(path.read_bytes())["published"].items():
            if not (root / name).is_file() or _sha256(root / name) != sha256:
                yield f"{root.relative_to(folder) / name} is not what was published"
