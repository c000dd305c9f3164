"""Threads kept on CPUs of their own, and ahead of other processes, while something is timed.

The process gets as many CPUs as it has threads, of as many cores as there are, so that no thread
moves to another core or shares one; threads that are started meanwhile inherit that. Where cores
differ in speed the fast ones are taken first, and then the highest numbers: the first CPU serves
most interrupts.
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
_SPEEDS = "cpu_capacity", "cpufreq/cpuinfo_max_freq"
_CLASSES = 5
"""Cores of a kind differ by some per cent in their highest frequency, kinds by a quarter."""
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


def let_go(process: int) -> None:
    """Gives a process that this one has started all CPUs and no higher priority, if it may."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(process, range(os.sysconf("SC_NPROCESSORS_CONF")))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, process, max(0, _nice(process)))


def _choice(allowed: set[int], threads: int) -> set[int]:
    """The CPUs to run on: one a core as long as there are cores."""
    cores: dict[str, list[int]] = {}
    for cpu in sorted(allowed, reverse=True):
        cores.setdefault(_siblings(cpu), []).append(cpu)
    rank = {cpu: place for core in cores.values() for place, cpu in enumerate(core)}
    speed = _speeds(allowed)
    ordered = sorted(allowed, key=lambda cpu: (rank[cpu], -speed[cpu], -cpu))
    return set(ordered[: max(1, threads)])


def _speeds(cpus: set[int]) -> dict[int, int]:
    """Of each its class, the highest the fastest; one for all where the kernel doesn't tell."""
    for name in _SPEEDS:
        told = {cpu: _number(_CPUS / f"cpu{cpu}" / name) for cpu in cpus}
        if fastest := all(told.values()) and max(told.values()):
            return {cpu: round(_CLASSES * each / fastest) for cpu, each in told.items()}
    return dict.fromkeys(cpus, _CLASSES)


def _number(file: Path) -> int:
    """What a file of the kernel says; 0 where it says nothing."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


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
