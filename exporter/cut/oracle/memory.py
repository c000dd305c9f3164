"""How much memory is free, as far as the system tells."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system doesn't say (not Linux).

    A container's own limit counts. Cached files don't, since they give way.
    """
    known = [free for free in (_of_the_machine(), _of_the_cgroup()) if free is not None]
    return min(known, default=None)


def _of_the_machine() -> int | None:
    free = _numbers(_MEMINFO).get("MemAvailable:")
    return None if free is None else free * 1024


def _of_the_cgroup() -> int | None:
    """What is left below the limit of this container (cgroup v2)."""
    try:
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return None
    return max(0, limit - used + _numbers(_CGROUP / "memory.stat").get("file", 0))


def _numbers(file: Path) -> dict[str, int]:
    """A file of lines that begin with a name and a number."""
    try:
        lines = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
        return {line[0]: int(line[1]) for line in lines if len(line) > 1}
    except (OSError, ValueError):
        return {}
