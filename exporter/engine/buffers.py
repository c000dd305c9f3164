"""How much device memory a run needs, reckoned before any is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from exporter.errors import BackendError

ALIGNMENT_BYTES = 256
"""Of what CUDA hands out; every buffer is rounded up to it."""


def rounded_up(size_bytes: int) -> int:
    """A buffer's size: never nothing, since an empty tensor needs an address too."""
    return max(1, -(-size_bytes // ALIGNMENT_BYTES)) * ALIGNMENT_BYTES


def plan_buffers(lanes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """One buffer for each tensor, large enough for every profile: only one runs at a time.

    Args:
        lanes: For each profile, the bytes of its inputs and outputs at their largest.
    """
    plan: dict[str, int] = {}
    for sizes in lanes:
        for name, size in sizes.items():
            plan[name] = max(plan.get(name, 0), rounded_up(size))
    return plan


def out_of_memory(what: str, asked: int, free: int, total: int) -> BackendError:
    """The error for a device that has too little left.

    Args:
        what: What the memory was for.
        asked: Bytes that it takes.
        free: Bytes that are free.
        total: Bytes of the device.
    """
    takes, left, whole = (bytes_in_words(size) for size in (asked, free, total))
    return BackendError(
        f"{what} takes {takes} of device memory; {left} of {whole} are free.",
        "End what else runs on the GPU, or build for a smaller batch or a shorter context.",
    )


def bytes_in_words(size: int) -> str:
    """A size in GB or MB (10^9, 10^6 bytes)."""
    return f"{size / 1e9:.2f} GB" if size >= 10_000_000 else f"{size / 1e6:.2f} MB"
