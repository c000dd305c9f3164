"""Processes: their children, what libraries print in one, how much memory and time one has."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from exporter.progress import Progress

_T = TypeVar("_T")
_PR_SET_PDEATHSIG = 1
_LOGGERS = ("torch", "onnxscript", "onnx_ir", "optimum", "transformers")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_KERNEL_COUNTERS = Path("/proc/stat")
_IDLE = (3, 4)  # of: user nice system idle iowait irq softirq steal
_COUNTED = 8  # guest time, which follows, is in user time already


def child_command(worker: Sequence[str]) -> list[str]:
    """How this Python starts a worker, which is told whose child it is."""
    return [sys.executable, *worker, str(os.getpid())]


def end_with_parent(parent: int) -> None:
    """Has the system kill this process when its parent has gone, whatever it is doing then.

    Killed at once, it can't be writing still when the same command is called again.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def within(seconds: float, work: Callable[[], _T]) -> _T:
    """What some work in native code gives that may never end; it then goes on in vain."""
    done: Future[_T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # a panic in Rust is no Exception
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result(seconds)


def limit_itself(seconds: int, nbytes: int) -> None:
    """Has the system end this process at so much processor time and memory; it writes no file."""
    limits = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: nbytes}
    for what, most in {**limits, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}.items():
        with contextlib.suppress(OSError, ValueError):  # what not every system has
            resource.setrlimit(what, (most, most))


def run_limited(
    worker: Sequence[str], request: Mapping[str, Any], seconds: float
) -> dict[str, Any] | None:
    """The answer of a worker that limits itself, both JSON; None where it ends without one."""
    path = os.pathsep.join(filter(None, sys.path))
    try:
        done = subprocess.run(  # noqa: S603
            child_command(worker),
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=seconds,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        return None
    answer: dict[str, Any] | None = json.loads(done.stdout) if done.returncode == 0 else None
    return answer


class _DetailHandler(logging.Handler):
    """Passes log records on as details."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """One line a record."""
        self._progress.detail(f"{record.name}: {record.getMessage()}")


@contextlib.contextmanager
def captured_output(progress: Progress) -> Iterator[None]:
    """Passes what libraries print, log and warn on as details, instead of to the terminal."""
    printed = StringIO()
    handler = _DetailHandler(progress)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        for logger in _loggers():
            stack.enter_context(_only_handler(logger, handler))
        try:
            yield
        finally:
            for line in (*printed.getvalue().splitlines(), *(str(w.message) for w in caught)):
                progress.detail(line)


def _loggers() -> list[logging.Logger]:
    """The libraries' loggers, and those below them that have handlers of their own.

    Without PyTorch's ``__trace`` loggers: they are silent unless someone listens, and slow then.
    """
    named = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]
    ours = [logger for logger in named if logger.name.partition(".")[0] in _LOGGERS]
    return [
        logger
        for logger in ours
        if logger.name in _LOGGERS or (logger.handlers and "__" not in logger.name)
    ]


@contextlib.contextmanager
def _only_handler(logger: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    before, propagate = list(logger.handlers), logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before, propagate


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system doesn't say (not Linux).

    A container's own limit counts. Cached files don't, since they give way.
    """
    known = [free for free in (_of_the_machine(), _of_the_cgroup()) if free is not None]
    return min(known, default=None)


def _of_the_machine() -> int | None:
    free = _numbers(_MEMINFO).get("MemAvailable:")
    return None if free is None else free * 1024


def _of_the_cgroup() -> int | None:
    """What is left below the limit of this container (cgroup v2)."""
    try:
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return None
    return max(0, limit - used + _numbers(_CGROUP / "memory.stat").get("file", 0))


def _numbers(file: Path) -> dict[str, int]:
    """A file of lines that begin with a name and a number."""
    try:
        lines = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
        return {line[0]: int(line[1]) for line in lines if len(line) > 1}
    except (OSError, ValueError):
        return {}


@dataclass(frozen=True)
class CpuTimes:
    """Seconds of CPU time since some beginning, over all CPUs."""

    total: float
    busy: float
    own: float


def cpu_times() -> CpuTimes | None:
    """The counters as they are now; None where the kernel doesn't tell them."""
    try:
        first = _KERNEL_COUNTERS.read_text(encoding="ascii").splitlines()[0]
        ticks = [int(field) for field in first.split()[1 : 1 + _COUNTED]]
        idle = sum(ticks[field] for field in _IDLE)
    except (OSError, ValueError, IndexError):
        return None
    second = os.sysconf("SC_CLK_TCK")
    own = os.times()
    return CpuTimes(sum(ticks) / second, (sum(ticks) - idle) / second, own.user + own.system)


def other_cpu_share(before: CpuTimes | None, after: CpuTimes | None) -> float | None:
    """Share of all CPU time between two readings that other processes took, 0 to 1.

    None where a reading is missing, or where no time has passed by the kernel's counters.
    """
    if before is None or after is None or after.total <= before.total:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    return min(1.0, max(0.0, others / (after.total - before.total)))
