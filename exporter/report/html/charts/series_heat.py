"""Scores of a series as maps: layers down, points across; and how far each two points agree."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from exporter.artifacts import KindStability
from exporter.report.html.charts.heat import LABELS, Shades
from exporter.report.html.charts.svg import WIDTH, Drawing
from exporter.report.words import significant

_LEFT, _TOP = 26.0, 18.0
_WIDEST, _TALLEST, _LOWEST = 80.0, 14.0, 6.0
_LAYERS_HEIGHT = 300.0
_CHARACTER = 6.2  # units that a letter of a label takes
_MATRIX_CELL = 44.0
_PALE_STEPS = 5  # of the shades: numbers stand on them


def series_heat_chart(
    key: str, kind: KindStability, places: Sequence[str], first: int, *, title: str
) -> Markup:
    """The drawing; a dot marks what is among the first so many at a point.

    Args:
        key: Its name on the page.
        kind: The scores.
        places: What the points are called, short.
        first: How many of each point's most redundant are marked.
        title: What it is.
    """
    rows, columns = len(kind.layers), len(places)
    tall = min(_TALLEST, max(_LOWEST, _LAYERS_HEIGHT / rows))
    wide = min(_WIDEST, (WIDTH - _LEFT) / columns)
    drawing = Drawing(key, _TOP + tall * rows + 4, title=title, description=_words(kind, places))
    _column_names(drawing, places, wide)
    every = max(1, round(11 / tall))
    for row, layer in enumerate(kind.layers):
        if row % every == 0:
            drawing.text(
                _LEFT - 5, _TOP + tall * (row + 0.5) + 3.5, str(layer), "tick small", "end"
            )
    shade = Shades([score for scores in kind.scores for score in scores])
    for column, scores in enumerate(kind.scores):
        _column(drawing, kind, scores, shade, first, places[column], (column, wide, tall))
    return drawing.markup()


def _column(
    drawing: Drawing,
    kind: KindStability,
    scores: Sequence[float],
    shade: Shades,
    first: int,
    place: str,
    at: tuple[int, float, float],
) -> None:
    column, wide, tall = at
    order = sorted(range(len(scores)), key=lambda index: (scores[index], index))
    ranks = {index: rank for rank, index in enumerate(order, start=1)}
    gap = 1.0 if min(wide, tall) > 5 else 0.4
    for row, (layer, score) in enumerate(zip(kind.layers, scores, strict=True)):
        x, y = _LEFT + wide * column, _TOP + tall * row
        tip = f"{place}, {LABELS[kind.kind]} {layer}: {significant(score, 3)}, "
        tip += f"{ranks[row]} of {len(scores)}"
        cls = f"h{shade(score)}"
        drawing.add("rect", cls=cls, x=x, y=y, width=wide - gap, height=tall - gap, tip=tip)
        if ranks[row] <= first:
            radius = min(3.2, 0.28 * min(wide, tall))
            middle = x + (wide - gap) / 2, y + (tall - gap) / 2
            drawing.add("circle", cls="dot candidate", cx=middle[0], cy=middle[1], r=radius)


def _column_names(drawing: Drawing, places: Sequence[str], wide: float) -> None:
    """As many as there is room for."""
    every = max(1, -(-(max(map(len, places)) + 1) * _CHARACTER // wide))
    for column in range(0, len(places), int(every)):
        x = _LEFT + wide * (column + 0.5)
        drawing.text(x, _TOP - 6, places[column], "tick small", "middle")


def _words(kind: KindStability, places: Sequence[str]) -> str:
    told = []
    for place, scores in zip(places, kind.scores, strict=True):
        lowest = sorted(range(len(scores)), key=lambda index: (scores[index], index))[:4]
        told.append(f"{place}: {', '.join(str(kind.layers[index]) for index in lowest)}")
    return f"The four most redundant layers at each point. {'; '.join(told)}."


def agreement_chart(key: str, kind: KindStability, places: Sequence[str], *, title: str) -> Markup:
    """Spearman's correlation of each two points, as a map with its numbers.

    Args:
        key: Its name on the page.
        kind: The agreements.
        places: What the points are called; numbers stand for them where they are many.
        title: What it is.
    """
    count = len(places)
    cell = min(_MATRIX_CELL, (WIDTH - _LEFT) / count)
    drawing = Drawing(
        key, _TOP + cell * count + 4, title=title, description=_pairs_words(kind, places)
    )
    for number in range(count):
        middle = cell * (number + 0.5)
        drawing.text(_LEFT + middle, _TOP - 6, str(number + 1), "tick", "middle")
        drawing.text(_LEFT - 8, _TOP + middle + 3.5, str(number + 1), "tick", "end")
    told = [pair.spearman for pair in kind.agreements if pair.spearman is not None]
    least = min([*told, 0.99])
    for pair in kind.agreements:
        share = 0.0 if pair.spearman is None else (pair.spearman - least) / (1 - least)
        shade = round(share * (_PALE_STEPS - 1))
        for row, column in ((pair.first, pair.second), (pair.second, pair.first)):
            value = "-" if pair.spearman is None else f"{pair.spearman:.2f}"
            tip = f"{places[row]}, {places[column]}: {value}"
            box = (_LEFT + cell * column, _TOP + cell * row, cell - 1.5)
            _pair(drawing, box, f"h{shade}", value, tip)
    return drawing.markup()


def _pair(
    drawing: Drawing, box: tuple[float, float, float], cls: str, value: str, tip: str
) -> None:
    x, y, size = box
    drawing.add("rect", cls=cls, x=x, y=y, width=size, height=size, tip=tip)
    if size >= 24:
        drawing.text(x + size / 2, y + size / 2 + 4, value, "num plain", "middle")


def _pairs_words(kind: KindStability, places: Sequence[str]) -> str:
    told = [
        f"{places[p.first]} and {places[p.second]}: "
        + ("not told" if p.spearman is None else f"{p.spearman:.2f}")
        for p in kind.agreements
    ]
    return "; ".join(told) + "."
