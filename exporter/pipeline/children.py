"""Work in a process of its own, which is heard to its end.

One that crashes, hangs, or is killed for its memory takes nothing else with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.processes import child_command
from exporter.progress import Progress, Task

_PATIENCE_S = 30.0


@dataclass(frozen=True)
class ChildEnd:
    """How a process has ended.

    Attributes:
        word: Its last one; empty where it ended without.
        code: Its exit code; below 0 the number of the signal.
        during: What it was doing, where it ended without a word.
    """

    word: dict[str, Any]
    code: int
    during: str | None = None

    @property
    def told(self) -> str:
        """How one ended that had no last word."""
        how = f"ended with exit code {self.code}"
        if self.code < 0:
            how = f"was killed: {signal.strsignal(-self.code)}"
        return how + (f", in the middle of {self.during!r}" if self.during else "")

    @property
    def hint(self) -> str | None:
        """What may be the reason."""
        return "Its memory may have run out." if self.code == -signal.SIGKILL else None


def run_child(worker: Sequence[str], request: str, progress: Progress) -> ChildEnd:
    """Runs a worker.

    Args:
        worker: How Python starts it; it calls :func:`exporter.pipeline.telling.work`.
        request: What it is told, on one line.
        progress: Hears what goes on in it.
    """
    with _child(worker) as child:
        assert child.stdin
        with contextlib.suppress(BrokenPipeError):  # its exit code says why
            child.stdin.write(request + "\n")
            child.stdin.close()
        word, during = _listen(child, progress)
        return ChildEnd(word, child.wait(), during)


@contextlib.contextmanager
def _child(worker: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is gone when the block ends."""
    path = os.pathsep.join(filter(None, sys.path))
    child = subprocess.Popen(  # noqa: S603
        child_command(worker),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        encoding="utf-8",
    )
    with contextlib.suppress(BrokenPipeError), child:
        try:
            yield child
        except BaseException:
            _end(child)
            raise
        finally:
            child.kill()


def _end(child: subprocess.Popen[str]) -> None:
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_PATIENCE_S)
    child.kill()


def _listen(child: subprocess.Popen[str], progress: Progress) -> tuple[dict[str, Any], str | None]:
    """Hears a process to its end, and passes on what it says.

    Returns:
        Its last word; and of one that ended without, what it was doing.
    """
    word: dict[str, Any] = {}
    with contextlib.ExitStack() as open_tasks:
        tasks: list[tuple[Task, contextlib.ExitStack, str]] = []
        for line in child.stdout or ():
            if not line.endswith("\n"):  # it was killed in the middle of a word
                break
            event = json.loads(line)
            if "task" in event:
                stack = contextlib.ExitStack()
                task = stack.enter_context(
                    progress.task(event["task"], event["total"], event.get("unit", ""))
                )
                open_tasks.push(stack)
                tasks.append((task, stack, event["task"]))
            elif "advance" in event:
                tasks[-1][0].advance(event["advance"])
            elif "end" in event:
                _close(tasks.pop()[1], failed=event.get("failed", False))
            elif "say" in event:
                progress.say(event["say"])
            elif "detail" in event:
                progress.detail(event["detail"])
            else:
                word = event
        during = tasks[-1][2] if tasks and not word else None
        if during is not None:
            for _, stack, _ in reversed(tasks):
                _close(stack, failed=True)
        return word, during


class _TaskError(Exception):
    """What ends a piece of work here that failed there."""


def _close(stack: contextlib.ExitStack, *, failed: bool) -> None:
    """Closes a piece of work; one that failed is not told as done."""
    with contextlib.suppress(_TaskError), stack:
        if failed:
            raise _TaskError
