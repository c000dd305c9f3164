"""Starts the building process anew without address space randomisation.

TensorRT-RTX orders some of its work by addresses: with random ones, eight builds of a graph came
out in six versions (1.7.1), with fixed ones in one.
"""

from __future__ import annotations

import ctypes
import os
import sys

_ADDR_NO_RANDOMIZE = 0x0040000
_ASK = 0xFFFFFFFF
_TRIED = "DEPTHCUT_FIXED_ADDRESSES"

WORKER = ("-P", "-m", "exporter.engine.worker")
"""How Python starts the building process; ``-P`` keeps it from importing what lies in the folder
that it is called in, such as a downloaded model's."""


def fix_addresses() -> bool:
    """Replaces this process by itself with fixed addresses, if the kernel lets it.

    Returns:
        Whether addresses are fixed. Some containers forbid it; builds may then differ.
    """
    try:
        personality = ctypes.CDLL(None).personality
    except (OSError, AttributeError):
        return False
    current = personality(_ASK)
    if current & _ADDR_NO_RANDOMIZE:
        return True
    if _TRIED in os.environ or personality(current | _ADDR_NO_RANDOMIZE) < 0:
        return False
    os.environ[_TRIED] = "1"
    os.environ["PYTHONHASHSEED"] = "0"
    return os.execv(sys.executable, [sys.executable, *WORKER, *sys.argv[1:]])  # noqa: S606
