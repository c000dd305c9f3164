"""How long-running library code tells what it does, without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, Self

_MB = 10**6
_WORTH_TELLING_BYTES = 256 * _MB


class Task(Protocol):
    """One piece of work of known or unknown length."""

    def advance(self, steps: int = 1) -> None:
        """Marks ``steps`` more units as done."""


class Progress(Protocol):
    """A listener. The command line draws bars or prints lines; a library user passes nothing."""

    def say(self, message: str) -> None:
        """One line about what is going on, or what was found."""

    def detail(self, message: str) -> None:
        """One line that only a curious user wants (``-v``)."""

    def task(
        self, description: str, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[Task]:
        """Opens a piece of work.

        Args:
            description: What is done.
            total: Its length in units; None when it is not known.
            unit: What is counted, in the plural, such as "samples".
        """


class _NoTask:
    def advance(self, steps: int = 1) -> None:
        """Does nothing."""


class Quiet:
    """The listener that hears nothing; the default everywhere in the library."""

    def say(self, message: str) -> None:
        """Does nothing."""

    def detail(self, message: str) -> None:
        """Does nothing."""

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
        """Does nothing around the work."""
        yield _NoTask()


QUIET: Progress = Quiet()


class ByteCount:
    """Tells a task of bytes, in whole megabytes."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._bytes = 0

    @classmethod
    @contextmanager
    def large(cls, progress: Progress, description: str, total: int) -> Iterator[Self]:
        """Opens a piece of work of ``total`` bytes; one that is done in no time is not told."""
        if total < _WORTH_TELLING_BYTES:
            progress = QUIET
        with progress.task(description, round(total / _MB), "MB") as task:
            yield cls(task)

    def add(self, count: int) -> None:
        """Marks ``count`` more bytes as done."""
        before = round(self._bytes / _MB)
        self._bytes += count
        if steps := round(self._bytes / _MB) - before:
            self._task.advance(steps)
