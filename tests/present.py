"""What a test needs to be there."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """A value that may be none elsewhere."""
    assert value is not None
    return value
