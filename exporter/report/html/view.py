"""What the page's template is given: plain data and finished drawings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from exporter.artifacts import ComparisonReport, ImportanceReport
from exporter.report.parts.part import Block, Grid, Sign

_MOST_BESIDE = 5
"""Columns of a table that stands beside a drawing."""
_WIDEST_BESIDE = 75
"""Characters of all its columns together."""


@dataclass(frozen=True)
class Source:
    """A report with its name on the page, and the importance that its plan rests on."""

    name: str
    report: ComparisonReport
    importance: ImportanceReport | None = None


@dataclass(frozen=True)
class Figure:
    """A drawing, what it says, and what its colours mean (class and word)."""

    svg: Markup
    caption: str
    legend: Sequence[tuple[str, str]] = ()
    title: str = ""


@dataclass(frozen=True)
class Tile:
    """A key figure: its value, what it is, and from what to what."""

    value: str
    label: str
    detail: str
    tone: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the report with its drawings; ``folded`` is what is opened by a click."""

    key: str
    title: str
    figures: Sequence[Figure] = ()
    blocks: Sequence[Block] = ()
    folded: Sequence[Block] = ()
    folded_figures: Sequence[Figure] = ()

    @property
    def is_split(self) -> bool:
        """Whether words and tables fit beside the drawing, where the screen is wide."""
        grids = [block for block in self.blocks if isinstance(block, Grid)]
        return len(self.figures) == 1 and not self.folded_figures and all(map(_is_narrow, grids))


def _is_narrow(grid: Grid) -> bool:
    columns = zip(grid.header, *grid.rows, strict=True)
    widths = [max(len(c if isinstance(c, str) else c.word) for c in cells) for cells in columns]
    return len(widths) <= _MOST_BESIDE and sum(widths) <= _WIDEST_BESIDE


@dataclass(frozen=True)
class View:
    """One report on the page."""

    key: str
    name: str
    subject: str
    model: str
    sentence: str
    notices: Sequence[str]
    signs: Sequence[Sign]
    tiles: Sequence[Tile]
    glance: Sequence[Grid]
    sections: Sequence[Section]
