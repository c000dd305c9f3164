"""How long-running library code tells what it does, without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


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

    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Task]:
        """Opens a piece of work of ``total`` units; None when the length is not known."""


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
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        """Does nothing around the work."""
        yield _NoTask()


QUIET: Progress = Quiet()
