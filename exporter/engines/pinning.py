"""Threads kept on CPUs of their own, and ahead of other processes, while something is timed.

The process gets as many CPUs as it has threads, of as many cores as there are, so that no thread
moves to another core or shares one; threads that are started meanwhile inherit that. The highest
numbers are taken first: the first CPU serves most interrupts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from exporter.artifacts import Pinning

NICE = -10
"""As other processes' share goes, each level is about a quarter more (``sched(7)``)."""
_THREADS = Path("/proc/self/task")
_CPUS = Path("/sys/devices/system/cpu")
_Place = tuple[set[int], int]
"""A thread's CPUs and its nice value."""


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[Pinning]:
    """Pins this process and raises its priority, as far as that is allowed; undoes it at the end.

    Args:
        threads: That are kept busy.

    Yields:
        What was done, and in ``refused`` what the system doesn't allow.
    """
    allowed = os.sched_getaffinity(0)
    before: dict[int, _Place] = {}
    _for_all(lambda tid: before.update({tid: (os.sched_getaffinity(tid), _nice(tid))}))
    usual = allowed, _nice(0)
    cpus = _choice(allowed, threads)
    refused = []
    with contextlib.ExitStack() as undoing:
        undoing.callback(_restore, before, usual)
        try:
            _for_all(lambda tid: os.sched_setaffinity(tid, cpus))
        except OSError as error:
            refused.append(f"CPUs of its own: {error.strerror}")
        try:
            _for_all(lambda tid: os.setpriority(os.PRIO_PROCESS, tid, min(NICE, _nice(tid))))
        except OSError as error:
            refused.append(f"a higher priority: {error.strerror}")
        if threads > len(allowed):
            refused.append(f"a CPU for each of {threads} threads: {len(allowed)} are allowed")
        yield Pinning(cpus=sorted(os.sched_getaffinity(0)), nice=_nice(0), refused=refused)


def _choice(allowed: set[int], threads: int) -> set[int]:
    """The CPUs to run on: one a core as long as there are cores."""
    cores: dict[str, list[int]] = {}
    for cpu in sorted(allowed, reverse=True):
        cores.setdefault(_siblings(cpu), []).append(cpu)
    rank = {cpu: place for core in cores.values() for place, cpu in enumerate(core)}
    ordered = sorted(allowed, key=lambda cpu: (rank[cpu], -cpu))
    return set(ordered[: max(1, threads)])


def _siblings(cpu: int) -> str:
    """The CPUs of its core, as the kernel writes them; itself where the kernel doesn't."""
    try:
        file = _CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def _for_all(do: Callable[[int], None]) -> None:
    """For each thread of this process that hasn't ended meanwhile."""
    for each in list(_THREADS.iterdir()):
        with contextlib.suppress(ProcessLookupError):
            do(int(each.name))


def _nice(tid: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, tid)


def _restore(before: Mapping[int, _Place], usual: _Place) -> None:
    """Threads that were started meanwhile get what this one had."""

    def restore(tid: int) -> None:
        cpus, nice = before.get(tid, usual)
        with contextlib.suppress(OSError):  # what wasn't allowed has changed nothing
            os.sched_setaffinity(tid, cpus)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, tid, nice)

    _for_all(restore)
