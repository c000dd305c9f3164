"""Weights on huge pages: a processor that reads them finds its way in a few steps instead of many.

A decode step reads every weight once. On pages of 4 KiB that is a walk through the page tables for
every 4 KiB, and a longer one on a virtual machine; on pages of 2 MiB the tables fit into the
processor's own. ONNX Runtime takes its memory from malloc, which asks for no huge pages unless the
process was started with ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1``. Where the kernel leaves the
choice to programs (``madvise`` in ``/sys/kernel/mm/transparent_hugepage/enabled``) they are asked
for here, once the weights are loaded: the kernel then moves what is there (``MADV_COLLAPSE``, Linux
6.1). What it can't move stays as it is, so no result ever depends on it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

HUGE_PAGE_BYTES = 2 << 20

_MAPS = Path("/proc/self/maps")
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # linux/mman.h, asm-generic/mman-common.h
_FEWEST_PAGES = 2  # a smaller region holds hardly a whole page


def move_to_huge_pages() -> int:
    """Moves what this process has in large private memory to huge pages.

    Returns:
        Bytes that lie on huge pages afterwards; 0 where the kernel has none to give.
    """
    if not _allowed():
        return 0
    try:
        maps = _MAPS.read_text(encoding="utf-8", errors="replace")
    except OSError:  # a sandbox without /proc
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved = 0
    for begin, end in private_regions(maps):
        madvise(begin, end - begin, _MADV_HUGEPAGE)  # for what is still to be written there
        for page in range(begin, end, HUGE_PAGE_BYTES):
            moved += madvise(page, HUGE_PAGE_BYTES, _MADV_COLLAPSE) == 0
    return moved * HUGE_PAGE_BYTES


def private_regions(maps: str) -> Iterator[tuple[int, int]]:
    """The whole huge pages of regions that hold a program's own data, and are writable.

    Args:
        maps: The text of ``/proc/PID/maps``.

    Yields:
        First address and end of each, multiples of a huge page.
    """
    for line in maps.splitlines():
        span, rights, _, _, inode, *name = line.split(maxsplit=5)
        # Stacks grow, and a file's pages are not this program's.
        if rights != "rw-p" or inode != "0" or name not in ([], ["[heap]"]):
            continue
        begin, end = (int(address, 16) for address in span.split("-"))
        first = -(-begin // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        last = end // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if last - first >= _FEWEST_PAGES * HUGE_PAGE_BYTES:
            yield first, last


def _allowed() -> bool:
    """Whether the kernel gives huge pages; where it gives all or none there is nothing to ask."""
    try:
        return sys.platform == "linux" and "[madvise]" in _ENABLED.read_text(encoding="ascii")
    except OSError:
        return False
