"""Reads amounts as users write them: shares and lengths of contexts."""

from __future__ import annotations

import re

from exporter.errors import UsageError

_SHARE = re.compile(r"(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<percent>%)?")
_TOKENS = re.compile(r"(?P<number>\d+)\s*(?P<thousands>k)?", re.IGNORECASE)


def share(text: str) -> float:
    """``5%`` or ``0.05``.

    Raises:
        UsageError: It is neither; a bare number above 1 may be meant as either.
    """
    told = _SHARE.fullmatch(text.strip())
    value = float(told["number"]) / (100 if told["percent"] else 1) if told else -1.0
    if told is None or (value > 1 and not told["percent"]):
        raise UsageError(f"{text!r} is not a share.", "Write 5% or 0.05.")
    return value


def tokens(text: str) -> int:
    """``32k`` (32 times 1024) or ``32768``.

    Raises:
        UsageError: It is neither, or 0.
    """
    told = _TOKENS.fullmatch(text.strip())
    number = int(told["number"]) * (1024 if told["thousands"] else 1) if told else 0
    if number < 1:
        raise UsageError(f"{text!r} is not a number of tokens.", "Write 32k or 32768.")
    return number
