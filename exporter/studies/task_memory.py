"""Tasks' results that an interrupted call leaves to the next."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from exporter.artifacts import TaskResult
from exporter.errors import UsageError
from exporter.files import write_text
from graph_passes.files.placing import append
from graph_passes.files.reading import TABLE_BYTES, parse_json, read_text

_FIRST = '{"tasks": '
_RESULTS = TypeAdapter(list[TaskResult])
Branches = frozenset[tuple[int, str]]


class TaskMemory:
    """What cut models scored, by the branches that were left out; kept in a file where one is told.

    The file has a JSON object a line: first what all depends on, then a cut with its results. A
    line that a crash cut short counts as missing.

    Args:
        path: The file; None keeps nothing between calls.
        about: What the results depend on; a file about something else is begun anew.

    Raises:
        UsageError: The file is something else.
        UnsafeInputError: A line of it is nested deeper than any that is written here.
    """

    def __init__(self, path: Path | None, about: Mapping[str, object]) -> None:
        self._path = path
        self._known: dict[Branches, list[TaskResult]] = {}
        if path is None:
            return
        first = json.dumps({"tasks": dict(about)}, sort_keys=True)
        lines = read_text(path, limit=TABLE_BYTES).splitlines() if path.exists() else []
        if lines and not lines[0].startswith(_FIRST):
            raise UsageError(
                f"{path} is there and holds no tasks' results.",
                "Move it away, or name another output.",
            )
        kept = list(filter(self._learn, lines[1:])) if lines[:1] == [first] else []
        write_text(path, "".join(f"{line}\n" for line in [first, *kept]))

    def get(self, cut: Iterable[tuple[int, str]]) -> list[TaskResult] | None:
        """A cut's results; None where they aren't known."""
        return self._known.get(frozenset(cut))

    def keep(self, cut: Iterable[tuple[int, str]], results: Sequence[TaskResult]) -> None:
        """Remembers a cut's results."""
        branches = frozenset(cut)
        self._known[branches] = list(results)
        if self._path is None:
            return
        told = {"cut": sorted(branches), "results": [result.model_dump() for result in results]}
        append(self._path, json.dumps(told) + "\n")

    def _learn(self, line: str) -> bool:
        try:
            told = parse_json(line, str(self._path))
            branches = frozenset((int(layer), str(kind)) for layer, kind in told["cut"])
            self._known[branches] = _RESULTS.validate_python(told["results"])
        except (ValueError, KeyError, TypeError, ValidationError):
            return False
        return True
