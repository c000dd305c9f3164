"""From a sweep's YAML to what it says, or to where in it the mistake is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from exporter.artifacts import json_path
from exporter.errors import SweepError, first_line
from exporter.files import sha256_bytes
from exporter.optional import require
from exporter.pipeline.sweep.schema import SweepFile

_MOST_TOLD = 5
_HINT = "What may stand there: exporter/docs/sweeps.md."
_WORDS = {
    "extra_forbidden": "this key is not known here",
    "missing": "this is missing",
    "model_type": "keys and their values are expected here",
    "tuple_type": "a list is expected here",
}
_Key = int | str


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was asked for.

    Attributes:
        path: The file.
        text: What it holds, to the letter.
        file: The same, validated.
    """

    path: Path
    text: str
    file: SweepFile

    @property
    def sha256(self) -> str:
        """Of the file."""
        return sha256_bytes(self.text.encode())


def read_sweep(path: Path) -> Sweep:
    """Reads and validates a sweep's file. Names in it are not looked up.

    Raises:
        SweepError: It can't be read, is no YAML, names a key twice, or says what isn't understood;
            with the line and the JSON path.
        MissingDependencyError: Without PyYAML, which the extra ``torch`` brings.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError(f"{path} can't be read: {first_line(error)}.") from error
    return parse_sweep(text, path)


def parse_sweep(text: str, path: Path) -> Sweep:
    """The same of a text that was read before.

    Raises:
        SweepError: As :func:`read_sweep` does.
        MissingDependencyError: Likewise.
    """
    root, data = _parsed(text, path)
    try:
        return Sweep(path, text, SweepFile.model_validate(data))
    except ValidationError as error:
        raise SweepError("\n".join(_mistakes(error, root, path)), _HINT) from error


def _parsed(text: str, path: Path) -> tuple[Any, Any]:
    """The YAML's nodes, which know their lines, and its data."""
    yaml: Any = require("yaml", extra="torch")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        for key in _repeated_keys(root, set()):
            raise SweepError(
                f"{path}, line {key.start_mark.line + 1}: the key {key.value!r} is there twice.",
                "YAML keeps the last one only; remove one.",
            )
        return root, _data(yaml, root, path)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        told = getattr(error, "problem", None) or first_line(error)
        raise SweepError(f"{path}{where}: this is no YAML: {told}.") from error


def _data(yaml: Any, root: Any, path: Path) -> Any:
    """The nodes' values."""
    loader = yaml.SafeLoader("")
    try:
        return None if root is None else loader.construct_document(root)
    except (ValueError, AttributeError, OverflowError) as error:  # PyYAML lets them through
        place = f"{path}, line {_unreadable(yaml, root)}"
        raise SweepError(
            f"{place}: this is no number or date: {first_line(error)}.",
            "Put it in quotes, if it is a name.",
        ) from error
    finally:
        loader.dispose()


def _unreadable(yaml: Any, node: Any) -> int:
    """The line of the first plain value that can't be made."""
    if not isinstance(node.value, str):
        parts = itertools.chain.from_iterable(
            p if isinstance(p, tuple) else (p,) for p in node.value
        )
        return next((line for part in parts if (line := _unreadable(yaml, part))), 0)
    try:
        yaml.SafeLoader("").construct_document(node)
    except (ValueError, AttributeError, OverflowError):
        return int(node.start_mark.line) + 1
    return 0


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


def _mistakes(error: ValidationError, root: Any, path: Path) -> Iterator[str]:
    found = _deepest(error.errors(include_url=False, include_input=False))
    for one in found[:_MOST_TOLD]:
        line = _line(root, one["loc"])
        words = _WORDS.get(one["type"], one["msg"].removeprefix("Value error, ")).rstrip(".")
        where = f"{path}, line {line}" if line else str(path)
        yield f"{where}: {json_path(one['loc'])}: {words}."
    if len(found) > _MOST_TOLD:
        yield f"And {len(found) - _MOST_TOLD} more."


def _deepest(found: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Without what is only said because something within is wrong."""
    places = [one["loc"] for one in found]
    return [
        one
        for one in found
        if not any(len(p) > len(one["loc"]) and p[: len(one["loc"])] == one["loc"] for p in places)
    ]


def _line(node: Any, location: tuple[_Key, ...]) -> int | None:
    """The line of the deepest part of a location that the file has."""
    line = None if node is None else node.start_mark.line + 1
    for key in location:
        inner = _inner(node, key)
        if inner is None:
            break
        node, mark = inner
        line = mark.line + 1
    return line


def _inner(node: Any, key: _Key) -> tuple[Any, Any] | None:
    """What stands under a key, and where that begins."""
    values = [] if node is None or isinstance(node.value, str) else node.value
    if isinstance(key, int):
        items = [item for item in values if not isinstance(item, tuple)]
        return (items[key], items[key].start_mark) if key < len(items) else None
    pairs = (item for item in values if isinstance(item, tuple) and item[0].value == key)
    return next(((value, name.start_mark) for name, value in pairs), None)
