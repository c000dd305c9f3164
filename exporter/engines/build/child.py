"""Runs the building process and listens to it; a crash in it becomes an error here."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from exporter.engines.build.libraries import EngineLibrary
from exporter.errors import EngineError
from exporter.files import scratch_folder
from exporter.processes import child_command
from exporter.progress import Progress, Task

_LAST_WORDS = 2000
_PERCENT = 100
_ADDR_NO_RANDOMIZE, _ASK = 0x0040000, 0xFFFFFFFF  # sys/personality.h

WORKER = ("-P", "-m", "exporter.engines.build.worker")
"""How Python starts the building process; ``-P`` keeps it from importing what lies in the folder
that it is called in, such as a downloaded model's."""


def run_job(
    library: EngineLibrary, request: dict[str, Any], progress: Progress, what: str
) -> dict[str, Any]:
    """Has a process of its own do a job."""
    with EngineJob(library, request) as job:
        return job.finish({}, progress, what)


class EngineJob:
    """A building process, which starts at once; it is gone when the block ends.

    What it needs first is told at the start, the rest when it is known: meanwhile it loads the
    library.
    """

    def __init__(self, library: EngineLibrary, request: dict[str, Any]) -> None:
        self._library = library
        self._request = request
        self._leave = contextlib.ExitStack()

    def __enter__(self) -> EngineJob:
        self.begin = time.perf_counter()
        with self._leave:
            self._said = self._leave.enter_context(scratch_folder("engine")) / "said"
            errors = self._leave.enter_context(self._said.open("wb"))
            with fixed_addresses():
                self._child = subprocess.Popen(  # noqa: S603
                    child_command(WORKER),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env={**os.environ, "PYTHONHASHSEED": "0"},
                )
            self._leave.callback(self._end)
            self._tell({"backend": self._library.backend, **self._request})
            self._leave = self._leave.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._leave.close()

    @cached_property
    def version(self) -> str:
        """Of the library that a build's process has loaded; it is waited for."""
        told = _next_event(self._child)
        if "version" in told:
            return str(told["version"])
        self._child.wait()
        raise _failure(told, self._child.returncode, self._library, self._words())

    def finish(self, rest: dict[str, Any], progress: Progress, what: str) -> dict[str, Any]:
        """Tells the process the rest and waits for its result."""
        with progress.task(what, _PERCENT, "%") as task:
            self._tell(rest)
            outcome = _listen(self._child, task)
            words, code = self._words(), self._child.returncode
            if words:
                progress.detail(words)
            if "result" in outcome and code == 0:
                result: dict[str, Any] = outcome["result"]
                return result
            # Within: what failed isn't done.
            raise _failure(outcome, code, self._library, words)

    def _words(self) -> str:
        return self._said.read_text(encoding="utf-8", errors="replace")[-_LAST_WORDS:].strip()

    def _tell(self, request: dict[str, Any]) -> None:
        assert self._child.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended: its exit code says why
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()

    def _end(self) -> None:
        self._child.kill()
        with contextlib.suppress(BrokenPipeError):
            self._child.communicate()


def _next_event(child: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What a process says next; empty where it has ended."""
    line = child.stdout.readline() if child.stdout else b""
    told: dict[str, Any] = json.loads(line) if line else {}
    return told


def _listen(child: subprocess.Popen[bytes], task: Task) -> dict[str, Any]:
    """Hears a process to its end."""
    outcome: dict[str, Any] = {}
    percent = 0
    while event := _next_event(child):
        if "progress" in event:
            reached = max(percent, int(event["progress"] * _PERCENT))  # phases begin again
            task.advance(reached - percent)
            percent = reached
        else:
            outcome = event
    child.wait()
    task.advance(_PERCENT - percent)
    return outcome


def _failure(outcome: dict[str, Any], code: int, library: EngineLibrary, words: str) -> EngineError:
    """Why a process gave no result."""
    if "error" in outcome:
        told = outcome["error"]
        return EngineError(told["message"], told["hint"], code=told["code"])
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        hint = "Memory may have run out." if code == -signal.SIGKILL else "See depthcut doctor."
        return EngineError(f"{library.backend} crashed: its process {how}.", hint)
    last = words.splitlines()[-1] if words else f"exit code {code}"
    return EngineError(f"{library.backend} failed: {last}")


@contextlib.contextmanager
def fixed_addresses() -> Iterator[None]:
    """Processes that this thread starts meanwhile have fixed addresses, if the kernel lets them.

    TensorRT-RTX orders some of its work by addresses: with random ones, eight builds of a graph
    came out in six versions (1.7.1), with fixed ones in one. Some containers forbid it.
    """
    personality = _personality()
    before = personality(_ASK)
    personality(before | _ADDR_NO_RANDOMIZE)
    try:
        yield
    finally:
        personality(before)


def has_fixed_addresses() -> bool:
    """Whether this process was started with fixed addresses."""
    return bool(_personality()(_ASK) & _ADDR_NO_RANDOMIZE)


def _personality() -> Callable[[int], int]:
    """The kernel's call; one that does nothing where there is none."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).personality
    except (OSError, AttributeError):
        return lambda _: 0
    return found
