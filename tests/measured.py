"""Whole child processes: how long they take and how much memory at their worst."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# The kernel's own count for children (ru_maxrss) would include the parent at the moment of the
# fork; this one is the process's own, and files that it has mapped count in it.
_REPORT = """
import sys as _sys
from pathlib import Path as _Path
def _report():
    lines = _Path("/proc/self/status").read_text().splitlines()
    print(next(line for line in lines if line.startswith("VmHWM")), file=_sys.stderr)
"""
_COMMAND = """
import exporter.cli
code = exporter.cli.run()
_report()
_sys.exit(code)
"""


@dataclass(frozen=True)
class Measured:
    """One child process."""

    seconds: float
    peak_mb: float
    output: str


class ChildFailed(Exception):
    """The child ended with an error; the text is its standard error."""


def depthcut(*arguments: str | Path) -> Measured:
    """Runs the command line."""
    return script(_COMMAND, arguments)


def script(
    text: str, arguments: Sequence[str | Path] = (), *, folder: Path | None = None
) -> Measured:
    """Runs Python code; it calls ``_report()`` when it is done."""
    command = [sys.executable, "-c", _REPORT + text, *map(str, arguments)]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise ChildFailed(done.stderr.strip() or f"ended with {done.returncode}")
    kilobytes = int(done.stderr.split("VmHWM:")[1].split()[0])
    return Measured(seconds, kilobytes * 1024 / 1e6, done.stdout)


def takes_holes(folder: Path) -> bool:
    """Whether the file system leaves out what nobody has written; made sure with a small file."""
    probe = folder / "probe"
    with probe.open("wb") as file:
        file.truncate(16 << 20)
    blocks = getattr(probe.stat(), "st_blocks", 1 << 20)
    probe.unlink()
    return blocks * 512 < 1 << 20
