"""A map of cells: scores by layer and kind, or by layer and file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from exporter.report.drawing import WIDTH, Drawing, number

SHADES = 9
"""From palest to darkest: the classes ``h0`` to ``h8``."""
_MARGINS = (26.0, 46.0)
"""Units to the left of the cells, for names of at most three letters, and for longer ones."""
_ABOVE = 15.0  # the columns' names
_BELOW = 9.0
_LOWEST, _ALL_ROWS = 6.0, 300.0
_CHARACTER = 5.2


@dataclass(frozen=True)
class MapCell:
    """One cell: its class, its tip, and whether it is crossed out or dotted."""

    cls: str
    tip: str
    crossed: bool = False
    dotted: bool = False


@dataclass(frozen=True)
class CellMap:
    """Rows below one another; columns go on in a further band where they are many."""

    title: str
    description: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Mapping[tuple[int, int], MapCell]
    widest: float = 22.0  # units that a cell is wide at most
    tallest: float = 20.0  # units that it is tall at most
    most_across: int = 20

    def draw(self, key: str) -> Markup:
        """The drawing."""
        bands = -(-len(self.columns) // self.most_across)
        across = -(-len(self.columns) // max(bands, 1))
        left = _MARGINS[max(map(len, self.rows), default=0) > 3]
        wide = min(self.widest, (WIDTH - left) / max(across, 1))
        tall = min(self.tallest, max(_LOWEST, _ALL_ROWS / max(len(self.rows), 1)))
        high = _ABOVE + tall * len(self.rows) + _BELOW
        drawing = Drawing(
            key, high * bands or 1, title=self.title, description=self.description
        )  # fmt: skip
        for band in range(bands):
            columns = range(across * band, min(across * (band + 1), len(self.columns)))
            self._draw_band(drawing, columns, (left, high * band), (wide, tall))
        return drawing.markup()

    def _draw_band(
        self,
        drawing: Drawing,
        columns: range,
        origin: tuple[float, float],
        size: tuple[float, float],
    ) -> None:
        (left, top), (wide, tall) = origin, size
        for row in range(0, len(self.rows), max(1, round(11 / tall))):
            y = top + _ABOVE + tall * (row + 0.5) + 3.5
            drawing.text(left - 6, y, self.rows[row], "tick", "end")
        longest = max((len(self.columns[column]) for column in columns), default=0)
        every = max(1, math.ceil((longest + 1) * _CHARACTER / wide))
        for place, column in enumerate(columns):
            x = left + wide * place
            if place % every == 0:
                name = self.columns[column]
                drawing.text(x + wide / 2, top + 11, name, "tick small", "middle")
            for row in range(len(self.rows)):
                if (cell := self.cells.get((row, column))) is not None:
                    _draw_cell(drawing, cell, x, top + _ABOVE + tall * row, wide, tall)


def _draw_cell(
    drawing: Drawing, cell: MapCell, x: float, y: float, wide: float, tall: float
) -> None:
    gap = 1.5 if min(wide, tall) > 5 else 0.4
    width, height = wide - gap, tall - gap
    drawing.rect(x, y, width, height, cell.cls, cell.tip)
    middle = x + width / 2, y + height / 2
    if cell.crossed:
        left, top, right, bottom = (
            number(v) for v in (x + 1, y + 1, x + width - 1, y + height - 1)
        )
        box = f"M{left} {top}H{right}V{bottom}H{left}Z"
        drawing.add("path", cls="cut", d=f"{box}L{right} {bottom}M{right} {top}L{left} {bottom}")
    if cell.dotted:
        drawing.mark(*middle, "candidate", radius=min(3.2, 0.28 * min(wide, tall)))


class Shades:
    """From a score to its shade: by its logarithm, since a few scores are far above the rest.

    Where some are zero or below (as a perplexity that falls), by what is a logarithm far from zero.
    """

    def __init__(self, scores: Sequence[float]) -> None:
        finite = [score for score in scores if math.isfinite(score)]
        self._log = bool(finite) and min(finite) > 0
        sizes = sorted(abs(score) for score in finite if score)
        self._middle = sizes[len(sizes) // 2] if sizes else 1.0
        values = [self._place(score) for score in finite] or [0.0]
        self._low, self._span = min(values), (max(values) - min(values)) or 1.0

    def _place(self, score: float) -> float:
        return math.log(score) if self._log else math.asinh(score / self._middle)

    def __call__(self, score: float) -> int:
        """The number of its shade, from 0 to :data:`SHADES` - 1."""
        if not math.isfinite(score):
            return SHADES - 1
        share = (self._place(score) - self._low) / self._span
        return round(min(1.0, max(0.0, share)) * (SHADES - 1))
