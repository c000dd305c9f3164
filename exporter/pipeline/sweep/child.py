"""Cells one after the other, each in a process of its own.

One that crashes, or is killed for its memory, is then a cell that failed; and none is timed in
memory that an earlier one has left in pieces.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from exporter.artifacts import SweepCell
from exporter.errors import SweepError
from exporter.pipeline.sweep.job import Job, failed, missing
from exporter.processes import child_command
from exporter.progress import Progress, Task

WORKER = ("-P", "-m", "exporter.pipeline.sweep.worker")
"""How Python starts it; ``-P`` keeps it from importing what lies in the folder that it is called
in."""
_PATIENCE_S = 30.0


def run_in_children(jobs: Sequence[Job], progress: Progress) -> Iterator[tuple[int, SweepCell]]:
    """Runs jobs one after the other.

    Args:
        jobs: The cells.
        progress: Hears which one begins, and what goes on in it.

    Yields:
        Each job's place among them, and what came of it.

    Raises:
        OSError: The disk is full.
    """
    for place, job in enumerate(jobs):
        progress.say(f"sweep: {place + 1} of {len(jobs)}: {job} ...")
        yield place, run_in_child(job, progress)


def run_in_child(job: Job, progress: Progress) -> SweepCell:
    """Runs one job.

    Args:
        job: The cell.
        progress: Hears what goes on in it.

    Raises:
        OSError: The disk is full.
    """
    with _child() as child:
        assert child.stdin
        with contextlib.suppress(BrokenPipeError):  # its exit code says why
            child.stdin.write(job.to_json() + "\n")
            child.stdin.close()
        outcome = _listen(child, progress)
        code = child.wait()
    if "cell" in outcome:
        return SweepCell.model_validate(outcome["cell"])
    if "full" in outcome:
        raise OSError(outcome["errno"], os.strerror(outcome["errno"]), outcome["full"])
    return _crashed(job, code, outcome.get("during"))


@contextlib.contextmanager
def _child() -> Iterator[subprocess.Popen[str]]:
    """A process that is gone when the block ends: asked first, so that it can tidy up."""
    path = os.pathsep.join(filter(None, sys.path))
    child = subprocess.Popen(  # noqa: S603
        child_command(WORKER),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        encoding="utf-8",
    )
    try:
        with child:
            try:
                yield child
            except BaseException:
                child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_PATIENCE_S)
                raise
            finally:
                child.kill()
    except BrokenPipeError:
        pass


def _listen(child: subprocess.Popen[str], progress: Progress) -> dict[str, Any]:
    """Hears a process to its end, and passes on what it says.

    Returns:
        Its last word; of one that ended without, what it was doing.
    """
    outcome: dict[str, Any] = {}
    with contextlib.ExitStack() as open_tasks:
        tasks: list[tuple[Task, contextlib.ExitStack, str]] = []
        for line in child.stdout or ():
            if not line.endswith("\n"):  # it was killed in the middle of a word
                break
            event = json.loads(line)
            if "task" in event:
                stack = contextlib.ExitStack()
                task = stack.enter_context(progress.task(event["task"], event["total"]))
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
                outcome = event
        if tasks and not outcome:
            outcome = {"during": tasks[-1][2]}
            for _, stack, _ in reversed(tasks):
                _close(stack, failed=True)
        return outcome


class _TaskError(Exception):
    """What ends a piece of work here that failed there."""


def _close(stack: contextlib.ExitStack, *, failed: bool) -> None:
    """Closes a piece of work; one that failed is not told as done."""
    with contextlib.suppress(_TaskError), stack:
        if failed:
            raise _TaskError


def _crashed(job: Job, code: int, during: str | None) -> SweepCell:
    """The cell of a process that ended without a word."""
    cell = job.cell()
    how = f"ended with exit code {code}"
    if code < 0:
        how = f"was killed: {signal.strsignal(-code)}"
    hint = "Its memory may have run out." if code == -signal.SIGKILL else None
    doing = f", in the middle of {during!r}" if during else ""
    error = SweepError(f"The cell's process {how}{doing}.")
    return failed(missing(cell, job.key), error.message, error, hint)
