"""The machine that a measurement was taken on: what it is, and what it does meanwhile."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from exporter.artifacts import Environment, MachineState
from exporter.engines.build.libraries import ask_driver
from exporter.printable import counted

_CPU_INFO = Path("/proc/cpuinfo")
_CPUS = Path("/sys/devices/system/cpu")
_FIELDS = ("clocks_event_reasons.active", "utilization.gpu")
_SETTINGS = (
    "power.limit", "clocks.max.sm", "clocks.max.memory", "clocks.applications.graphics",
    "ecc.mode.current", "persistence_mode",
)  # fmt: skip
_EVERY_MS = 500
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
        gpu_settings=gpu_settings() if gpu else {},
        affinity=sorted(os.sched_getaffinity(0)),
    )


def machine_state(
    throttle: ThrottleCounts,
    watch: GpuWatch | None = None,  # of the NVIDIA GPU that is in use; None where none is
    machine: MachineWatch | None = None,
) -> MachineState:
    """The machine at this moment."""
    throttled = watch.throttled() if watch else None
    state = MachineState(throttled=throttle.rose() if throttled is None else throttled)
    return state.model_copy(update=machine.look() if machine else {})


def default_threads() -> int:
    """Physical cores that this process may use, container limits included."""
    allowed = os.sched_getaffinity(0)
    cores = _physical_cores(_cpu_info(), allowed) or len(allowed)
    cpus = quota().cpus
    return max(1, cores if cpus is None else min(cores, int(cpus)))


def processor_name() -> str:
    """The processor's name as the kernel tells it."""
    match = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", _cpu_info(), re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or "unknown"


def gpu_name() -> str | None:
    """The GPU's name and driver; None where the driver's tool doesn't answer."""
    return _nvidia_smi("name,driver_version") or None


def gpu_settings() -> dict[str, str]:
    """How the GPU is set, by the names and in the units of the driver's tool.

    What it doesn't know is left out. It has no name for locked clocks: they show in the clocks
    while something runs.
    """
    parts = _nvidia_smi(",".join(_SETTINGS)).split(",")
    if len(parts) != len(_SETTINGS):  # one field that it doesn't know, and it answers nothing
        parts = [_nvidia_smi(field) for field in _SETTINGS]
    pairs = zip(_SETTINGS, (part.strip() for part in parts), strict=True)
    return {name: item for name, item in pairs if item and "N/A" not in item}


def _nvidia_smi(fields: str) -> str:
    """What the driver's own tool says of the GPU; empty where it doesn't answer."""
    query = _query(fields)
    if query is None:
        return ""
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _query(fields: str) -> list[str] | None:
    """The tool's call for CUDA's first card, by its UUID, since the tool counts otherwise."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    card = next((device.uuid for device in ask_driver().devices if device.uuid), "0")
    return [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"--id={card}"]


class GpuWatch:
    """Looks at the GPU twice a second while something runs on it.

    One process of the driver's tool does that from entering to leaving.
    """

    def __init__(self) -> None:
        self._tool: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def __enter__(self) -> Self:
        query = _query(",".join(_FIELDS))
        if query is not None:
            command = [*query, f"--loop-ms={_EVERY_MS}"]
            with contextlib.suppress(OSError):
                self._tool = subprocess.Popen(  # noqa: S603
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
        if self._tool is not None and self._tool.stdout is not None:
            os.set_blocking(self._tool.stdout.fileno(), False)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._tool is not None:
            self._tool.kill()
            self._tool.communicate()
            self._tool = None

    def throttled(self) -> bool | None:
        """Whether it was since this was last asked, while it worked; None: nothing was seen."""
        looks = [look for look in map(throttled_in, self._lines()) if look is not None]
        return any(looks) if looks else None

    def _lines(self) -> list[str]:
        data = self._tool.stdout.read() if self._tool and self._tool.stdout else None
        *whole, self._rest = (self._rest + (data or b"")).split(b"\n")
        return [line.decode(errors="replace") for line in whole]


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


class ThrottleCounts:
    """The kernel's counts of cores that were throttled for heat."""

    def __init__(self) -> None:
        self._last = _throttle_count()

    def rose(self) -> bool | None:
        """Whether one was since this was last asked; None where the kernel doesn't count."""
        before, self._last = self._last, _throttle_count()
        return None if before is None or self._last is None else self._last > before


def _throttle_count() -> int | None:
    names = [
        kernel_text(path) for path in _CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    ]
    counts = [int(count) for count in names if count and count.isdigit()]
    return sum(counts) if counts else None


def throttled_in(line: str) -> bool | None:
    """Whether the GPU is throttled, by a line of the tool's; None where it idles, or none tells."""
    fields = line.split(",")
    if len(fields) != len(_FIELDS):
        return None
    reasons, used = (_number(field.strip()) for field in fields)
    return None if reasons is None or used == 0 else bool(int(reasons) & _THROTTLING)


def _number(text: str) -> float | None:
    try:
        return float(int(text, 16)) if text.startswith("0x") else float(text)
    except ValueError:
        return None


_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_KERNEL_COUNTERS = Path("/proc/stat")
_STEAL, _COUNTED = 7, 8  # of: user nice system idle iowait irq softirq steal
_MICROSECONDS = 1e6
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
    """The lowest quota of this process's control groups."""
    quotas = [_quota_at(folder) for folder in _groups()]
    limited = [item for item in quotas if item.cpus is not None]
    return min(limited, key=lambda limit: limit.cpus or 0.0, default=Quota(None, None))


def _groups() -> list[Path]:
    """The folders of this process's groups, from the root down; within a container the root."""
    own = (kernel_text(_OWN_CGROUP) or "").splitlines()
    path = next((line.removeprefix("0::/") for line in own if line.startswith("0::/")), "")
    inner = _CGROUP / path
    return [folder for folder in (inner, *inner.parents) if folder.is_relative_to(_CGROUP)]


def _quota_at(folder: Path) -> Quota:
    parts = (kernel_text(folder / "cpu.max") or "").split()
    with contextlib.suppress(ValueError, IndexError, ZeroDivisionError):
        cpus = float(parts[0]) / float(parts[-1])
        return Quota(cpus, _waited_s(folder), folder) if cpus > 0 else Quota(None, None)
    return Quota(None, None)


def _waited_s(folder: Path) -> float | None:
    for line in (kernel_text(folder / "cpu.stat") or "").splitlines():
        name, _, number = line.partition(" ")
        if name == "throttled_usec" and number.isdigit():
            return int(number) / _MICROSECONDS
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
