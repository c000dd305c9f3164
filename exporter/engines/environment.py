"""The machine that a measurement was taken on."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from exporter.artifacts import Environment, MachineState
from exporter.engines import gpu_state

_CPU_INFO = Path("/proc/cpuinfo")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MHZ = re.compile(r"^cpu MHz\s*:\s*([\d.]+)", re.MULTILINE)
_CPUS = Path("/sys/devices/system/cpu")


def environment(*, threads: int, gpu: bool) -> Environment:
    """Describes the machine as it is now.

    Args:
        threads: The threads that the measurement sets.
        gpu: Whether it runs on an NVIDIA GPU.
    """
    return Environment(
        machine=platform.machine(),
        processor=processor_name(),
        cpu_count=os.cpu_count() or 1,
        threads=threads,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        platform=platform.platform(),
        python=platform.python_version(),
        gpu=gpu_name() if gpu else None,
        load_average_1m=os.getloadavg()[0],
        affinity=sorted(os.sched_getaffinity(0)),
        governor=_text(_CPUS / "cpu0/cpufreq/scaling_governor"),
    )


def machine_state(seconds: float, throttle: ThrottleCounts, *, gpu: bool) -> MachineState:
    """The machine at this moment.

    Args:
        seconds: Since measuring began.
        throttle: The CPU's counts, as they were at the moment before.
        gpu: Whether an NVIDIA GPU is in use.
    """
    clocks = gpu_state.clocks() if gpu else None
    return MachineState(
        seconds=seconds,
        load_average_1m=os.getloadavg()[0],
        cpu_mhz=_cpu_mhz(),
        throttled=clocks.throttled if clocks else throttle.rose(),
        gpu_sm_mhz=clocks.sm_mhz if clocks else None,
        gpu_celsius=clocks.celsius if clocks else None,
    )


def default_threads() -> int:
    """Physical cores that this process may use, container limits included."""
    allowed = os.sched_getaffinity(0)
    cores = _physical_cores(_cpu_info(), allowed) or len(allowed)
    quota = _quota_cpus()
    return max(1, cores if quota is None else min(cores, int(quota)))


def processor_name() -> str:
    """The processor's name as the kernel tells it."""
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", _cpu_info(), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or "unknown"


def gpu_name() -> str | None:
    """The first NVIDIA GPU's name and driver; None where the driver's tool doesn't answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _cpu_info() -> str:
    try:
        return _CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _physical_cores(cpu_info: str, allowed: set[int]) -> int:
    """Distinct (socket, core) pairs among the allowed CPUs; 0 where the kernel doesn't say."""
    cores = set()
    for block in cpu_info.split("\n\n"):
        fields = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", block, re.MULTILINE))
        if "core id" in fields and int(fields.get("processor", -1)) in allowed:
            cores.add((fields.get("physical id", "0"), fields["core id"]))
    return len(cores)


def _quota_cpus() -> float | None:
    try:
        limit, period = _CPU_QUOTA.read_text(encoding="ascii").split()
        return None if limit == "max" else float(limit) / float(period)
    except (OSError, ValueError):
        return None


def _cpu_mhz() -> float | None:
    """Mean over the CPUs that this process may use."""
    found = []
    for cpu in os.sched_getaffinity(0):
        told = _text(_CPUS / f"cpu{cpu}/cpufreq/scaling_cur_freq")
        found += [float(told) / 1000] if told and told.isdigit() else []
    found = found or [float(mhz) for mhz in _MHZ.findall(_cpu_info())]
    return sum(found) / len(found) if found else None


class ThrottleCounts:
    """The kernel's counts of cores that were throttled for heat."""

    def __init__(self) -> None:
        self._last = _throttle_count()

    def rose(self) -> bool | None:
        """Whether one was since this was last asked; None where the kernel doesn't count."""
        before, self._last = self._last, _throttle_count()
        return None if before is None or self._last is None else self._last > before


def _throttle_count() -> int | None:
    told = [_text(path) for path in _CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    counts = [int(count) for count in told if count and count.isdigit()]
    return sum(counts) if counts else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None
