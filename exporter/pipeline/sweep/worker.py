"""The process that one cell runs in: ``python -m exporter.pipeline.sweep.worker``.

It is told whose child it is, and its work in one line on standard input. What it has to
say goes to standard output, one JSON object a line: ``say`` and ``detail``; ``task``, ``advance``
and ``end`` of a piece of work; and at the end its last word. What libraries print goes to standard
error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from exporter.pipeline.sweep.job import Job, run_job
from exporter.printable import printable_output
from exporter.processes import end_with_parent
from exporter.progress import Task

INTERRUPTED = 130


class Told:
    """A progress listener that passes everything on."""

    def __init__(self, events: TextIO) -> None:
        self._events = events

    def send(self, **event: Any) -> None:
        """Sends one event."""
        self._events.write(json.dumps(event) + "\n")
        self._events.flush()

    def say(self, message: str) -> None:
        """Passes a line on."""
        self.send(say=message)

    def detail(self, message: str) -> None:
        """Passes a line for the curious on."""
        self.send(detail=message)

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
        """Passes a piece of work on, and how far it is."""
        self.send(task=description, total=total, unit=unit)
        failed = True
        try:
            yield _Steps(self)
            failed = False
        finally:
            self.send(end=description, failed=failed)


class _Steps:
    def __init__(self, told: Told) -> None:
        self._told = told

    def advance(self, steps: int = 1) -> None:
        """Passes it on."""
        self._told.send(advance=steps)


def work() -> int:
    """Runs the cell; gives the exit code."""
    end_with_parent(int(sys.argv[1]))
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, _interrupt)
    result = Told(events)
    try:
        with printable_output():
            cell = run_job(Job.from_json(sys.stdin.readline()), result)
            result.send(cell=cell.model_dump(mode="json"))
    except OSError as error:  # only a full disk comes through
        result.send(full=str(error.filename or ""), errno=error.errno)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(work())
