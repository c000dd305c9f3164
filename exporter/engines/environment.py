"""The machine that a measurement was taken on: what it is, and what it does meanwhile."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from exporter.artifacts import Environment, MachineState

_CPU_INFO = Path("/proc/cpuinfo")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MHZ = re.compile(r"^cpu MHz\s*:\s*([\d.]+)", re.MULTILINE)
_CPUS = Path("/sys/devices/system/cpu")
_FIELDS = ("clocks.sm", "temperature.gpu", "clocks_event_reasons.active")
# Why clocks are below what was asked for, from nvml.h: heat and power, in software and hardware.
# Idling and a limit that the user has set are no throttling.
_THROTTLING = 0x04 | 0x08 | 0x20 | 0x40 | 0x80


def environment(*, threads: int, gpu: bool) -> Environment:
    """Describes the machine as it is now."""
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
    clocks = gpu_clocks() if gpu else None
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
    return _nvidia_smi("name,driver_version") or None


def _nvidia_smi(fields: str) -> str:
    """What the driver's own tool says of the first GPU; empty where it doesn't answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


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


@dataclass(frozen=True)
class GpuClocks:
    """The GPU at one moment; None where the driver doesn't say."""

    sm_mhz: float | None
    celsius: float | None
    throttled: bool | None


def gpu_clocks() -> GpuClocks | None:
    """Asks the driver's own tool; None where it doesn't answer."""
    return parse_clocks(_nvidia_smi(",".join(_FIELDS)))


def parse_clocks(line: str) -> GpuClocks | None:
    """Reads one line of the tool's answer."""
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != len(_FIELDS):
        return None
    reasons = _number(fields[2])
    throttled = None if reasons is None else bool(int(reasons) & _THROTTLING)
    return GpuClocks(_number(fields[0]), _number(fields[1]), throttled)


def _number(text: str) -> float | None:
    try:
        return float(int(text, 16)) if text.startswith("0x") else float(text)
    except ValueError:
        return None
