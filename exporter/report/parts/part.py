"""A report's parts as plain data, which Markdown and HTML then write down each in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["good", "bad", "even", "unsure", "cut"]
"""How a word is meant; every form adds a sign of its own, never a colour alone."""


@dataclass(frozen=True)
class Sign:
    """A word that a reader looks for: a verdict, a check that doesn't hold."""

    word: str
    tone: Tone


@dataclass(frozen=True)
class Link:
    """A word that leads to a file beside the report."""

    word: str
    target: str


Cell = str | Sign | Link


@dataclass(frozen=True)
class Grid:
    """A table.

    An empty first cell goes on with the row above. ``right`` are the columns of numbers.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    right: Sequence[int] = ()


@dataclass(frozen=True)
class Note:
    """A paragraph; words between backticks are code, ``lead`` stands before it in bold."""

    text: str
    lead: str = ""


@dataclass(frozen=True)
class Bullets:
    """A list of short lines."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Command:
    """A line for a shell."""

    text: str


Block = Grid | Note | Bullets | Command


@dataclass(frozen=True)
class Part:
    """A section under one heading; ``key`` is its name within a page."""

    key: str
    title: str
    blocks: Sequence[Block]


_TONES: dict[str, Tone] = {
    "faster": "good",
    "slower": "bad",
    "same": "even",
    "inconclusive": "unsure",
}


def verdict_sign(word: str) -> Sign:
    """A verdict of a latency row as a sign."""
    return Sign(word, _TONES[word])
