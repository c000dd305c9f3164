"""The page: what the template is given, and the template itself."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from exporter.artifacts import ComparisonReport, ImportanceReport
from exporter.report.html.sections import sections
from exporter.report.html.summary import glance, tiles
from exporter.report.html.tradeoff import tradeoff_section
from exporter.report.html.view import Source, View
from exporter.report.parts.overview import letter
from exporter.report.parts.part import Block, Cell, Grid
from exporter.report.verdict import quality_sign, speed_sign, verdict_sentence
from exporter.report.words import headline, notices

_SIGNS = {"good": "▲", "bad": "▼", "even": "=", "unsure": "?", "cut": "×"}
_MARKED = re.compile(r"`([^`]+)`|\*([\w ]+)\*")


def render_html(report: ComparisonReport, importance: ImportanceReport | None = None) -> str:
    """One report as a page.

    Args:
        report: The comparison.
        importance: The scores that its plan rests on, for the map; left out without.
    """
    return render_page([Source("report", report, importance)])


def render_page(sources: Sequence[Source]) -> str:
    """One or several reports as a page; several share a plot, and stand folded below it.

    Args:
        sources: At least one.
    """
    several = len(sources) > 1
    views = [
        _view(source, index, f"r{index + 1}-" if several else "", len(sources))
        for index, source in enumerate(sources)
    ]
    style, style_hash = page_style()
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            views=views,
            several=several,
            overview=tradeoff_section(sources) if several else None,
            style=style,
            style_hash=style_hash,
            version=sources[0].report.versions.get("depthcut", ""),
        )
    )


def _view(source: Source, index: int, prefix: str, sources: int) -> View:
    report, importance = source.report, source.importance
    model = importance.model.source if importance else report.arms.baseline.path
    return View(
        key=prefix,
        name=f"{letter(index)}: {source.name}" if sources > 1 else "",
        subject=headline(report),
        model=model,
        sentence=verdict_sentence(report),
        notices=notices(report),
        signs=[speed_sign(report), quality_sign(report)],
        tiles=list(tiles(report)),
        glance=glance(source),
        sections=sections(source, prefix, sources=sources),
    )


@cache
def page_environment() -> Environment:
    """What finds and fills the templates."""
    environment = Environment(
        loader=PackageLoader("exporter.report.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(inline=_inline, spanned=_spanned, kind=_kind)
    environment.globals["signs"] = _SIGNS
    return environment


@cache
def page_style() -> tuple[Markup, str]:
    """The style sheet, and its hash for the page's policy."""
    file = resources.files("exporter.report.html") / "templates" / "style.css"
    style = file.read_text(encoding="utf-8")
    return Markup(style), _csp_hash(style)  # noqa: S704  # our own file


def _csp_hash(style: str) -> str:
    digest = hashlib.sha256(style.encode()).digest()
    return "sha256-" + base64.b64encode(digest).decode()


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
