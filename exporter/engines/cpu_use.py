"""How much of the machine other processes used, from the kernel's counters of CPU time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_KERNEL_COUNTERS = Path("/proc/stat")
_IDLE = (3, 4)  # of: user nice system idle iowait irq softirq steal
_COUNTED = 8  # guest time, which follows, is in user time already


@dataclass(frozen=True)
class CpuTimes:
    """Seconds of CPU time since some beginning, over all CPUs.

    Attributes:
        total: Idle time included.
        busy: What any process, the kernel or another virtual machine took.
        own: What this process took, with its threads.
    """

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
