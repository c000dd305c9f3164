"""YAML that a user writes: read safely, with the line that each key stands on."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from exporter.errors import UsageError, first_line
from graph_passes.files.reading import read_text

_Key = int | str
_UNREADABLE = (ValueError, AttributeError, OverflowError, LookupError)  # PyYAML lets them through
_MOST_VALUES = 10_000  # aliases counted as often as they stand for something


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Takes ``3e-4`` for the number that YAML 1.2 says it is, and tells where a value is none."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node."""
        try:
            return super().construct_object(node, deep)
        except _UNREADABLE as error:
            problem = f"no number or date ({first_line(error)}); a name stands in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]{1,2}$"),
    list("-+0123456789"),
)


@dataclass(frozen=True)
class YamlFile:
    """A file that was read."""

    path: Path
    text: str
    data: Any
    root: Any  # YAML's nodes, which know their lines

    def line(self, location: tuple[_Key, ...]) -> int | None:
        """The line of the deepest part of a location that the file has."""
        node, line = self.root, None
        if node is not None:
            line = node.start_mark.line + 1
        for key in location:
            inner = _inner(node, key)
            if inner is None:
                break
            node, mark = inner
            line = mark.line + 1
        return line

    def place(self, *location: _Key) -> str:
        """The file's name and that line."""
        line = self.line(location)
        return f"{self.path}, line {line}" if line else str(self.path)


def read_yaml(path: Path, error: type[UsageError] = UsageError) -> YamlFile:
    """Reads a file that the user has named."""
    try:
        text = read_text(path, named=True)
    except (OSError, UnicodeDecodeError) as found:
        raise error(f"{path} can't be read: {first_line(found)}.", code="unreadable") from found
    return parse_yaml(text, path, error)


def parse_yaml(text: str, path: Path, error: type[UsageError] = UsageError) -> YamlFile:
    """The same of a text that was read before."""
    try:
        root = yaml.compose(text, Loader=_Loader)
        if _count(root, {}) > _MOST_VALUES:
            raise error(f"{path} holds more than {_MOST_VALUES} values, or one that holds itself.")
        for key in _repeated_keys(root, set()):
            raise error(
                f"{path}, line {key.start_mark.line + 1}: the key {key.value!r} is there twice.",
                "YAML keeps the last one only; remove one.",
            )
        loader = _Loader("")
        try:
            data = None if root is None else loader.construct_document(root)
        finally:
            loader.dispose()
        return YamlFile(path, text, data, root)
    except (yaml.YAMLError, RecursionError) as found:
        mark = getattr(found, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        value = getattr(found, "problem", None) or first_line(found)
        raise error(f"{path}{where}: this is not valid YAML: {value}.") from found


def _count(node: Any, known: dict[int, float]) -> float:
    """How many values there are with every alias written out; infinite where one holds itself."""
    if node is None or isinstance(node.value, str):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # what is met again before it is counted
        parts = itertools.chain.from_iterable(
            item if isinstance(item, tuple) else (item,) for item in node.value
        )
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(node)]


def _repeated_keys(node: Any, seen: set[int]) -> Iterator[Any]:
    """Keys of mappings that were there before; an anchor's node is looked at once."""
    if node is None or id(node) in seen or isinstance(node.value, str):
        return
    seen.add(id(node))
    known: set[str] = set()
    for item in node.value:
        parts = item if isinstance(item, tuple) else (item,)
        key = parts[0]
        if len(parts) == 2 and isinstance(key.value, str):
            if key.value in known:
                yield key
            known.add(key.value)
        yield from _repeated_keys(parts[-1], seen)


def _inner(node: Any, key: _Key) -> tuple[Any, Any] | None:
    values = [] if node is None or isinstance(node.value, str) else node.value
    if isinstance(key, int):
        items = [item for item in values if not isinstance(item, tuple)]
        return (items[key], items[key].start_mark) if 0 <= key < len(items) else None
    pairs = (item for item in values if isinstance(item, tuple) and item[0].value == key)
    return next(((value, name.start_mark) for name, value in pairs), None)
