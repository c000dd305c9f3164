"""What stands in a folder, and whether it is one result and not a mixture of two."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
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
            path = here / name
            content = f"-> {path.readlink()}" if path.is_symlink() else _sha256(path)
            lines[path.relative_to(folder).as_posix()] = content
        if not folders and not files and here != folder:
            lines[here.relative_to(folder).as_posix() + "/"] = "an empty folder"
    return lines


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shown(entries: Tree) -> Tree:
    """Without what depthcut keeps for itself."""
    return {name: content for name, content in entries.items() if OURS not in Path(name).parts}


def pairs(folder: Path) -> dict[str, Pair]:
    """Every graph below a folder, as onnxruntime would find it there."""
    results = {}
    for path in sorted(folder.rglob("*.onnx")):
        name = path.relative_to(folder)
        if not path.is_file() or OURS in name.parts or name.parts[0] == _INPUTS:
            continue
        files = [path, *(path.parent / location for location in _locations(path.read_bytes()))]
        for missing in (file for file in files if not file.is_file()):
            raise ValueError(f"{path.name} names {missing.name}, which is not there")
        results[name.as_posix()] = tuple(map(_sha256, files))
    return results


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


def broken_promises(folder: Path) -> Iterator[str]:
    """Files that a memory of finished stages says are published, and that are others."""
    for path in folder.rglob(f"{OURS}/stages.json"):
        root = path.parents[1]
        if OURS in root.relative_to(folder).parts:
            continue
        for name, sha256 in json.loads(path.read_bytes())["published"].items():
            if not (root / name).is_file() or _sha256(root / name) != sha256:
                yield f"{root.relative_to(folder) / name} is not what was published"
