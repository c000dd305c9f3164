"""Clocks, temperature and throttling of the first NVIDIA GPU."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

_FIELDS = ("clocks.sm", "temperature.gpu", "clocks_event_reasons.active")
# Why clocks are below what was asked for, from nvml.h: heat and power, in software and hardware.
# Idling and a limit that the user has set are no throttling.
_THROTTLING = 0x04 | 0x08 | 0x20 | 0x40 | 0x80


@dataclass(frozen=True)
class GpuClocks:
    """The GPU at one moment; None where the driver doesn't say."""

    sm_mhz: float | None
    celsius: float | None
    throttled: bool | None


def clocks() -> GpuClocks | None:
    """Asks the driver's own tool; None where it doesn't answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return parse(done.stdout)


def parse(line: str) -> GpuClocks | None:
    """Reads one line of the tool's answer."""
    fields = [field.strip() for field in line.strip().split(",")]
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
