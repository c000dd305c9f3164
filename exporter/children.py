"""Processes of our own that do the work of one: none outlives the one that started it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def child_command(worker: Sequence[str]) -> list[str]:
    """How this Python starts a worker, which is told whose child it is.

    Args:
        worker: Python's arguments, such as ``-m`` and a module that calls :func:`end_with_parent`.
    """
    return [sys.executable, *worker, str(os.getpid())]


def end_with_parent(parent: int) -> None:
    """Has the system kill this process when its parent has gone, whatever it is doing then.

    Killed at once, it can't be writing still when the same command is called again.

    Args:
        parent: The parent's number. If that has gone already, this process ends here.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
