"""Documents as a page: one file that asks the network for nothing and runs no script."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from exporter.printable import visible
from exporter.report.sections.blocks import Block, Cell, Document, Figure, Grid, Section, plain

_SIGNS = {"good": "▲", "bad": "▼", "even": "=", "unsure": "?", "cut": "×"}
_MARKED = re.compile(r"`([^`]+)`|\*([\w ]+)\*")
_LONG_TABLE = 12
_OPEN_DETAILS = 6
_MOST_COLUMNS_BESIDE, _MOST_CHARACTERS_BESIDE = 5, 75
"""Of a table that stands beside a chart."""


def page(
    documents: Sequence[Document], names: Sequence[str] = (), overview: Section | None = None
) -> str:
    """One or several documents as a page; several stand folded below what is said of all.

    Args:
        documents: At least one.
        names: Theirs, where there are several.
        overview: What is said of all.
    """
    file = resources.files("exporter.report") / "templates" / "style.css"
    style = file.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return visible(
        _environment()
        .get_template("page.html.j2")
        .render(
            documents=documents,
            names=names,
            overview=overview,
            style=Markup(style),  # noqa: S704  # our own file
            style_hash=f"sha256-{digest}",
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("exporter.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(inline=_inline, spanned=_spanned, kind=_kind, layout=_Layout.of)
    environment.globals["signs"] = _SIGNS
    return environment


@dataclass(frozen=True)
class _Layout:
    """What of a section is open, and what is opened by a click."""

    figures: Sequence[Figure]
    folded_figures: Sequence[Figure]
    blocks: Sequence[Block]
    folded: Sequence[Grid]

    @classmethod
    def of(cls, section: Section) -> _Layout:
        details = [figure for figure in section.figures if figure.is_detail]
        many = details if len(details) > _OPEN_DETAILS else []
        grids = [block for block in section.blocks if isinstance(block, Grid)]
        long = [g for g in grids if len(g.rows) > _LONG_TABLE and not section.stays_open]
        return cls(
            [figure for figure in section.figures if figure not in many],
            many,
            [block for block in section.blocks if block not in long],
            long,
        )

    @property
    def is_split(self) -> bool:
        """Whether words and tables fit beside the chart, where the screen is wide."""
        grids = [block for block in self.blocks if isinstance(block, Grid)]
        return len(self.figures) == 1 and not self.folded_figures and all(map(_is_narrow, grids))


def _is_narrow(grid: Grid) -> bool:
    columns = zip(grid.header, *grid.rows, strict=True)
    widths = [max(len(plain(cell)) for cell in cells) for cells in columns]
    return len(widths) <= _MOST_COLUMNS_BESIDE and sum(widths) <= _MOST_CHARACTERS_BESIDE


def _inline(text: str) -> Markup:
    """A paragraph's text, with what stands between backticks as code, between asterisks leaning."""
    parts, end = [], 0
    for found in _MARKED.finditer(text):
        code, leaning = found.groups()
        tag, words = ("code", code) if code else ("em", leaning)
        parts += [escape(text[end : found.start()]), Markup(f"<{tag}>{{}}</{tag}>").format(words)]  # noqa: S704
        end = found.end()
    return Markup("").join([*parts, escape(text[end:])])


def _spanned(grid: Grid) -> Iterator[tuple[int, Sequence[Cell]]]:
    """Every row with how many rows its first cell spans; 0 where it goes on with the one above."""
    for index, row in enumerate(grid.rows):
        if index and row[0] == "":
            yield 0, row
            continue
        following = (i for i, later in enumerate(grid.rows[index + 1 :], 1) if later[0] != "")
        yield next(following, len(grid.rows) - index), row


def _kind(block: Block | Cell) -> str:
    return type(block).__name__
