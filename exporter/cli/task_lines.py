"""Pieces of work in a log: a line for each that is done, and a sign of life from long ones."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from exporter.progress import Task

BEGIN_AFTER_S = 10.0
PART_WORTH_TELLING_S = 20.0
LINE_EVERY_S = 20.0
LINE_EVERY_AT_MOST_S = 300.0
"""Some CI systems end what is silent for ten minutes."""


class TaskLines:
    """Writes what is going on as lines."""

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._clock = say, clock
        self._open: list[_Counted] = []
        self._due = 0.0
        self._said_begin = False

    @property
    def open(self) -> bool:
        """Whether any piece of work is."""
        return bool(self._open)

    def begin(self, description: str, total: int | None, unit: str = "") -> Task:
        """Opens a piece of work, as a part of the one that is open."""
        if not self._open:
            self._due, self._said_begin = self._clock() + BEGIN_AFTER_S, False
        self._open.append(_Counted(description, total, unit, self._clock()))
        return self._open[-1]

    def end(self, *, failed: bool) -> None:
        """Closes the one that was opened last."""
        task = self._open.pop()
        seconds = self._clock() - task.begin
        if not failed and is_worth_a_line(seconds, part=bool(self._open)):
            self._say(done_words(task.description, seconds))
        elif failed and not self._open and not self._said_begin:
            self._say(f"{task.description} ...")

    def tick(self) -> float:
        """Tells how far the work is, if that is due.

        The seconds until it is due again.
        """
        now, tasks = self._clock(), list(self._open)
        if not tasks:
            return BEGIN_AFTER_S
        if now < self._due:
            return self._due - now
        running_s = now - tasks[0].begin
        if self._said_begin:
            self._say(f"{'; '.join(task.words for task in tasks)}, after {running_s:.0f} s")
            pause = min(max(LINE_EVERY_S, running_s / 4), LINE_EVERY_AT_MOST_S)
        else:
            self._say(f"{tasks[0].description} ...")
            pause = max(LINE_EVERY_S - running_s, 0.0)
        self._said_begin = True
        self._due = now + pause
        return pause


@contextlib.contextmanager
def ticking(lines: TaskLines) -> Iterator[None]:
    """Lets a log tick from a thread during the block: few tasks tell each step."""
    over = threading.Event()

    def tick() -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads the log any more
            while not over.wait(lines.tick()):
                pass

    thread = threading.Thread(target=tick, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Counted:
    def __init__(self, description: str, total: int | None, unit: str, begin: float) -> None:
        self.description, self.begin = description, begin
        self._unit = f" {unit}" if unit else ""
        self._of = "" if total is None else f" of {total}"
        self._done = 0

    def advance(self, steps: int = 1) -> None:
        """Counts."""
        self._done += steps

    @property
    def words(self) -> str:
        """What it is, and how far."""
        known = self._done or self._of
        return (
            f"{self.description}: {self._done}{self._of}{self._unit}" if known else self.description
        )


def is_worth_a_line(seconds: float, *, part: bool) -> bool:
    """Whether the end of a piece of work is told."""
    return not part or seconds >= PART_WORTH_TELLING_S


def done_words(description: str, seconds: float) -> str:
    """The line at the end of a piece of work."""
    return f"{description}: done in {seconds:.1f} s"
