"""Lets processes start without address space randomisation.

TensorRT-RTX orders some of its work by addresses: with random ones, eight builds of a graph came
out in six versions (1.7.1), with fixed ones in one.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

_ADDR_NO_RANDOMIZE = 0x0040000
_ASK = 0xFFFFFFFF


@contextlib.contextmanager
def fixed_addresses() -> Iterator[None]:
    """Processes that this thread starts meanwhile have fixed addresses, if the kernel lets them.

    Some containers forbid it; builds may then differ.
    """
    personality = _personality()
    before = personality(_ASK)
    personality(before | _ADDR_NO_RANDOMIZE)
    try:
        yield
    finally:
        personality(before)


def has_fixed_addresses() -> bool:
    """Whether this process was started with fixed addresses."""
    return bool(_personality()(_ASK) & _ADDR_NO_RANDOMIZE)


def _personality() -> Callable[[int], int]:
    """The kernel's call; one that does nothing where there is none."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).personality
    except (OSError, AttributeError):
        return lambda _: 0
    return found
