"""Numbers and what they are of, as one says them."""

from __future__ import annotations


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """A number with its noun: ``1 block``, ``2 blocks``, ``0 blocks``.

    Args:
        number: How many.
        noun: For one.
        plural: For any other number; None: the noun with an s.
    """
    return f"{number:.12g} {noun if number == 1 else plural or noun + 's'}"


def are(number: float) -> str:
    """The verb behind such a number: ``is`` for one, ``are`` for any other."""
    return "is" if number == 1 else "are"
