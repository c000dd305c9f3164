"""What a report says, as plain data that Markdown, HTML and the terminal write each in its way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from exporter.report.charts.drawing import Chart

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

    An empty first cell goes on with the row above. ``right`` are the columns of numbers. Where
    ``is_prose``, cells are sentences, which wrap on a terminal; there an empty row parts others.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    right: Sequence[int] = ()
    is_prose: bool = False


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
    """A line for a shell, or a file's text."""

    text: str
    language: str = "sh"


Block = Grid | Note | Bullets | Command


@dataclass(frozen=True)
class Figure:
    """A chart, what it says, and what its marks mean (class and word).

    Attributes:
        is_detail: Whether it is one of a series that is folded where it is long.
    """

    chart: Chart
    caption: str = ""
    legend: Sequence[tuple[str, str]] = ()
    title: str = ""
    is_detail: bool = False


@dataclass(frozen=True)
class Section:
    """A section under one heading; charts are drawn where that can be.

    Attributes:
        key: Its name within a page.
        stays_open: Whether its tables are open however long they are.
    """

    key: str
    title: str
    blocks: Sequence[Block]
    figures: Sequence[Figure] = ()
    stays_open: bool = False


@dataclass(frozen=True)
class Tile:
    """A key figure: its value, what it is, and from what to what."""

    value: str
    label: str
    detail: str
    tone: str = ""


@dataclass(frozen=True)
class Document:
    """A report or a study as a whole.

    Attributes:
        command: Which of depthcut's commands made it.
        version: Of depthcut, as the data tell it.
        title: What was compared or studied.
        subject: Of what: the model, the text.
        lead: The result in a sentence or two.
        sections: In the order in which they are read.
        statements: The result in single sentences, the most important first.
        notices: Of these, the ones that say whose the figures are.
        signs: The result in words that a reader looks for.
        tiles: The key figures.
        glance: Speed, accuracy and size, each a table.
    """

    command: str
    version: str
    title: str
    subject: str
    lead: str
    sections: Sequence[Section]
    statements: Sequence[str] = ()
    notices: Sequence[str] = ()
    signs: Sequence[Sign] = ()
    tiles: Sequence[Tile] = ()
    glance: Sequence[Grid] = ()


_TONES: dict[str, Tone] = {
    "faster": "good",
    "slower": "bad",
    "same": "even",
    "inconclusive": "unsure",
}


def verdict_sign(word: str) -> Sign:
    """A verdict of a latency row as a sign."""
    return Sign(word, _TONES[word])


def plain(cell: Cell) -> str:
    """A cell's words."""
    return cell if isinstance(cell, str) else cell.word


def present(sections: Iterable[Section | None]) -> list[Section]:
    """The sections that there are."""
    return [section for section in sections if section is not None]
