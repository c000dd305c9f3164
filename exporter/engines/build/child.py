"""Runs the building process and listens to it; a crash in it becomes an error here."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

from exporter.engines.build.libraries import EngineLibrary
from exporter.errors import EngineError
from exporter.processes import child_command
from exporter.progress import Progress

_LAST_WORDS = 2000
_ADDR_NO_RANDOMIZE, _ASK = 0x0040000, 0xFFFFFFFF  # sys/personality.h

WORKER = ("-P", "-m", "exporter.engines.build.worker")
"""How Python starts the building process; ``-P`` keeps it from importing what lies in the folder
that it is called in, such as a downloaded model's."""


def run_job(
    library: EngineLibrary, request: dict[str, Any], progress: Progress, what: str
) -> dict[str, Any]:
    """Has a process of its own do a job; it is gone when this ends, however it ends."""
    content = json.dumps({"backend": library.backend, **request}).encode() + b"\n"
    with progress.task(what), fixed_addresses():  # what failed within isn't called done
        done = subprocess.run(  # noqa: S603
            child_command(WORKER),
            input=content,
            capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            check=False,
        )
        words = done.stderr.decode(errors="replace")[-_LAST_WORDS:].strip()
        if words:
            progress.detail(words)
        outcome: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
        if "result" in outcome and done.returncode == 0:
            result: dict[str, Any] = outcome["result"]
            return result
        raise _failure(outcome, done.returncode, library, words)


def _failure(outcome: dict[str, Any], code: int, library: EngineLibrary, words: str) -> EngineError:
    """Why a process gave no result."""
    if "error" in outcome:
        error = outcome["error"]
        return EngineError(error["message"], error["hint"], code=error["code"])
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
        result: Callable[[int], int] = ctypes.CDLL(None).personality
    except (OSError, AttributeError):
        return lambda _: 0
    return result
