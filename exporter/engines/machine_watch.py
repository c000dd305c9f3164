"""What takes the processor from a measurement: a quota, or other virtual machines."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.artifacts import MachineState
from exporter.printable import counted

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_KERNEL_COUNTERS = Path("/proc/stat")
_STEAL, _COUNTED = 7, 8  # of: user nice system idle iowait irq softirq steal
_MICROSECONDS, _NANOSECONDS = 1e6, 1e9
_LOOKS = 3
"""So many in a row must be bad: a moment's disturbance is what rounds in turns are for."""
_MOST_STEAL, _MOST_WAITING = 0.2, 0.1


@dataclass(frozen=True)
class Quota:
    """A limit on CPU time."""

    cpus: float | None  # CPUs' worth of time that the process's groups may take; None for no limit
    waited_s: float | None  # None where no kernel counts
    group: Path | None = None


def quota() -> Quota:
    """The lowest quota of this process's control groups, of version 2 or 1."""
    quotas = [_quota_at(folder) for folder in _groups()]
    limited = [item for item in quotas if item.cpus is not None]
    return min(limited, key=lambda limit: limit.cpus or 0.0, default=Quota(None, None))


def _groups() -> list[Path]:
    """The folders of this process's groups, from the root down; within a container the root."""
    own = [line.split(":", 2) for line in (kernel_text(_OWN_CGROUP) or "").splitlines()]
    paths = [_CGROUP, _CGROUP / "cpu", _CGROUP / "cpu,cpuacct"]
    for number, controllers, path in (names for names in own if len(names) == 3):
        if number == "0":
            base = _CGROUP
        elif "cpu" in controllers.split(","):
            base = _CGROUP / controllers
        else:
            continue
        inner = base / path.lstrip("/")
        paths += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(base)]
    return list(dict.fromkeys(paths))


def _quota_at(folder: Path) -> Quota:
    parts = (kernel_text(folder / "cpu.max") or "").split()
    if len(parts) != 2:
        parts = [kernel_text(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    with contextlib.suppress(ValueError, ZeroDivisionError):
        cpus = float(parts[0]) / float(parts[1])
        return Quota(cpus, _waited_s(folder), folder) if cpus > 0 else Quota(None, None)
    return Quota(None, None)


def _waited_s(folder: Path) -> float | None:
    for line in (kernel_text(folder / "cpu.stat") or "").splitlines():
        name, _, number = line.partition(" ")
        if name in ("throttled_usec", "throttled_time") and number.isdigit():
            return int(number) / (_MICROSECONDS if name.endswith("usec") else _NANOSECONDS)
    return None


def _stolen() -> tuple[int, int] | None:
    """Ticks that another virtual machine took, and all."""
    first = (kernel_text(_KERNEL_COUNTERS) or "").partition("\n")[0].split()[1 : 1 + _COUNTED]
    if len(first) < _COUNTED or not all(map(str.isdigit, first)):
        return None
    ticks = list(map(int, first))
    return ticks[_STEAL], sum(ticks)


class MachineWatch:
    """Looks at what was taken since the look before."""

    def __init__(self, threads: int, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._threads = max(1, min(threads, os.cpu_count() or threads))
        self._last = now(), quota(), _stolen()

    def look(self) -> dict[str, float | None]:
        """The fields of :class:`MachineState` that are known here."""
        before, limit, stolen = self._last
        self._last = self._now(), quota(), _stolen()
        passed, result = self._last[0] - before, self._last[1]
        waiting = None
        if limit.group == result.group and passed > 0:
            waiting = _share(limit.waited_s, result.waited_s, passed * self._threads)
        steal, now = None, self._last[2]
        if stolen is not None and now is not None and now[1] > stolen[1]:
            steal = (now[0] - stolen[0]) / (now[1] - stolen[1])
        return {
            "quota_cpus": result.cpus,
            "quota_waiting_share": waiting,
            "steal_share": steal,
        }


def _share(before: float | None, after: float | None, whole: float) -> float | None:
    """The part of a whole by which a count rose; None where it isn't told, or began anew."""
    if before is None or after is None or after < before:
        return None
    return min(1.0, (after - before) / whole)


def doubt(states: Sequence[MachineState]) -> str:
    """Why the last looks say that times can't be trusted; empty where they don't."""
    last = states[-_LOOKS:]
    if len(last) < _LOOKS:
        return ""
    for words, field, most in (
        ("another virtual machine took {} of the CPU time", "steal_share", _MOST_STEAL),
        ("the CPU quota kept the process waiting for {} of the time", "quota_waiting_share",
         _MOST_WAITING),
    ):  # fmt: skip
        shares = [getattr(state, field) for state in last]
        if all(share is not None and share > most for share in shares):
            return f"in {counted(_LOOKS, 'look')} in a row {words.format(f'{min(shares):.0%}')}"
    return ""


def kernel_text(path: Path) -> str | None:
    """What a file of the kernel's says; None where it isn't there, empty or not to be read."""
    try:
        return path.read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None
