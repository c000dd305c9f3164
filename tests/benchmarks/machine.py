"""What a benchmark ran on, printed above its figures."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

_LIBRARIES = ("depthcut", "onnx", "onnx-ir", "onnxruntime", "numpy")


def print_machine(*more: str) -> None:
    """Prints the machine and the versions of the libraries that matter."""
    print(f"{machine_line()}, {platform.platform()}, Python {platform.python_version()}, "
          f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(", ".join(f"{name} {_version(name)}" for name in (*_LIBRARIES, *more)), flush=True)


def machine_line() -> str:
    """Processor, their number, memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{_processor()}, {os.cpu_count()} CPUs, {memory:.0f} GB"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
