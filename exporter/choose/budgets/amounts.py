"""Reads lengths of contexts as users write them."""

from __future__ import annotations

import re

from exporter.errors import UsageError

_TOKENS = re.compile(r"(?P<number>\d+)\s*(?P<thousands>k)?", re.IGNORECASE)


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
