"""What a report says, as plain data that Markdown, HTML and the terminal write each in its way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from exporter.artifacts import CalibrationRef, PlanParts
from exporter.artifacts.base import TEXTS, Nouns
from exporter.artifacts.plan_figures import kind_of
from exporter.artifacts.stages import document_of
from exporter.report.words import listed, or_dash

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


SHADES = 6


class Shaded(str):
    """A number in a map: its shade says how many of the others are below it."""

    shade: int

    @classmethod
    def of(cls, words: str, share: float) -> Shaded:
        """By the share of the others that are below, from 0 to 1."""
        result = cls(words)
        result.shade = min(SHADES - 1, int(SHADES * share))
        return result


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


@dataclass(frozen=True)
class IntervalLine:
    """What is estimated, the estimate with its interval and noise, and that in words."""

    label: str
    value: float
    interval: tuple[float, float]
    noise: tuple[float, float]
    words: str
    tone: Tone


@dataclass(frozen=True)
class Intervals:
    """A chart of one estimate at least; a line marks the ``neutral`` value."""

    title: str
    lines: Sequence[IntervalLine]
    neutral: float
    caption: str

    @property
    def said(self) -> str:
        """What the drawing shows, in words."""
        return "; ".join(f"{line.label}: {line.words}" for line in self.lines)

    def place(self, value: float) -> float:
        """A value's place, of 360 units: between the labels and the words."""
        ends = [self.neutral, *(e for x in self.lines for e in (*x.interval, *x.noise))]
        low, high = min(ends), max(ends)
        start, end = (
            6.3 * max(map(len, texts)) + 12
            for texts in ([x.label for x in self.lines], [x.words for x in self.lines])
        )
        share = (value - low) / (high - low or 1.0)
        start = min(start, 320 - end)
        return round(start + share * (360 - end - start), 1)


Block = Grid | Note | Bullets | Command | Intervals
"""A chart is drawn where that can be."""


@dataclass(frozen=True)
class Section:
    """A section under one heading."""

    key: str
    title: str
    blocks: Sequence[Block]
    stays_open: bool = False


@dataclass(frozen=True)
class Document:
    """A report or a study as a whole."""

    command: str
    version: str
    title: str
    subject: str
    lead: str
    sections: Sequence[Section]
    notices: Sequence[str] = ()
    signs: Sequence[Sign] = ()


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


_ROLES = {
    "chosen": "{What} by which the dropped sublayers were chosen:",
    "fitted": "{What} to which replacements or weights were fitted:",
    "stopped": "Validation {what}, which decided when to stop and what to keep:",
    "judged": "Test {what}, on which the plan's own figures were measured:",
}


def parts_blocks(
    parts: PlanParts, shown: Callable[[str], str] = str, read: Nouns = TEXTS
) -> Iterator[Block]:
    """A sentence for each part that there was, and the plan's cost on each text."""
    what = read.much
    names = [
        f"{_ROLES[role].format(what=what, What=what.capitalize())} {_listed(refs, shown, read)}."
        for role, refs in parts.roles.items()
    ]
    if names:
        yield Bullets(names)
    if parts.judged_apart:
        known = {key: value for one in parts.judged_apart for key, value in one.figures.items()}
        figures = kind_of(known).main_figures
        header = [what, *(figure.row_name for figure in figures)]
        rows = [
            [shown(one.text.source), *(or_dash(one.figures.get(f.key), f.row) for f in figures)]
            for one in parts.judged_apart
        ]
        right = tuple(range(1, len(header)))
        caption = f"What the plan costs on each {'text' if read == TEXTS else 'source'}, in PyTorch"
        yield Grid(caption, header, rows, right=right)


def other_part(parts: PlanParts, judged: str) -> Iterator[Block]:
    """That the plan was made by other parts of the document that a comparison is judged on."""
    known = [
        role
        for role, refs in parts.decided.items()
        if document_of(judged) in {document_of(ref.source) for ref in refs}
    ]
    if known:
        yield Note(
            f"{judged} is another part of a text that the plan was {listed(known)} on: on "
            "texts of other kinds the accuracy is likely to be lower (--eval-text).",
            lead="In the domain:",
        )


def _listed(refs: Sequence[CalibrationRef], shown: Callable[[str], str], read: Nouns) -> str:
    named = [ref.model_copy(update={"source": shown(ref.source)}) for ref in refs]
    return listed([ref.describe(read) for ref in named])
