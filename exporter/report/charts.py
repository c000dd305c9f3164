"""Two charts as SVG, all of it escaped: a map of cells, and estimates with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from exporter.printable import significant

WIDTH = 360
"""Units from left to right in every drawing; a unit is a CSS pixel on a phone."""


class Drawing:
    """A drawing that also says in words what it shows."""

    def __init__(self, key: str, height: float, *, title: str, description: str) -> None:
        self._open = Markup(
            '<svg role="img" viewBox="0 0 {} {}" aria-labelledby="{}-t {}-d">'
            '<title id="{}-t">{}</title><desc id="{}-d">{}</desc>'
        ).format(WIDTH, number(height), key, key, key, title, key, description)
        self._body: list[Markup] = []

    def add(self, tag: str, text: str = "", *, tip: str = "", **attributes: str | float) -> None:
        """Adds an element; ``tip`` is shown when the mouse rests on it, ``cls`` is its class."""
        pairs = "".join(
            f' {"class" if name == "cls" else name.replace("_", "-")}="{_value(value)}"'
            for name, value in attributes.items()
        )
        inside = Markup("<title>{}</title>").format(tip) if tip else Markup("")
        inside += escape(text)
        end = f">{inside}</{tag}>" if inside else "/>"
        self._body.append(Markup(f"<{tag}{pairs}{end}"))  # noqa: S704  # all of it is escaped

    def line(self, x1: float, y1: float, x2: float, y2: float, cls: str) -> None:
        """A straight line."""
        self.add("path", cls=cls, d=polyline([(x1, y1), (x2, y2)]))

    def rect(
        self, x: float, y: float, width: float, height: float, cls: str, tip: str = ""
    ) -> None:
        """A rectangle by its upper left corner."""
        self.add("rect", cls=cls, x=x, y=y, width=width, height=height, tip=tip)

    def mark(self, x: float, y: float, cls: str, tip: str = "", *, radius: float) -> None:
        """A filled circle."""
        self.add("circle", cls=f"dot {cls}", cx=x, cy=y, r=radius, tip=tip)

    def text(self, x: float, y: float, text: str, cls: str = "", anchor: str = "start") -> None:
        """A line of text."""
        extra = {"text_anchor": anchor} if anchor != "start" else {}
        self.add("text", text, x=x, y=y, **({"cls": cls} if cls else {}), **extra)

    def markup(self) -> Markup:
        """The whole element."""
        return self._open + Markup("").join(self._body) + Markup("</svg>")


def polyline(points: Iterable[tuple[float, float]]) -> str:
    """A path through the points."""
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)


def number(value: float) -> str:
    """A coordinate, to a tenth of a unit."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _value(value: str | float) -> Markup:
    return escape(value if isinstance(value, str) else number(value))


_STEPS = (1, 2, 2.5, 5, 10)
_MARGIN = 0.06


@dataclass(frozen=True)
class Scale:
    """A scale: ``low`` stands at ``start``, ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value; what lies beyond the ends is held there."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values between the ends, at most so many."""
        span = self.high - self.low
        magnitude = 10.0 ** math.floor(math.log10(span / most))
        step = next(s * magnitude for s in _STEPS if span / (s * magnitude) <= most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def scale_over(values: Iterable[float], start: float, end: float) -> Scale:
    """A scale with a margin around the finite values; one without extent is given some."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    spread = (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - _MARGIN * spread, high + _MARGIN * spread, start, end)


def axis_below(drawing: Drawing, scale: Scale, y: float, unit: str) -> None:
    """Ticks with their numbers under a plot, and faint lines up to its top."""
    for tick in scale.ticks():
        text = f"{tick:.10g}"
        words = text if len(text) <= 7 else significant(tick, 3)
        drawing.line(scale(tick), 0, scale(tick), y, "grid")
        drawing.text(scale(tick), y + 13, words + unit, "tick", "middle")


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


_LONGEST_BESIDE = 18
_LETTER = 6.3


@dataclass(frozen=True)
class IntervalLine:
    """What is estimated, the estimate with its interval, and that in words."""

    label: str
    value: float
    low: float
    high: float
    words: str
    tone: str
    noise: tuple[float, float] | None = None


@dataclass(frozen=True)
class Intervals:
    """At least one estimate; a line marks the ``neutral`` value, a band each one's noise."""

    title: str
    lines: Sequence[IntervalLine]
    neutral: float
    unit: str = ""

    def draw(self, key: str) -> Markup:
        """The drawing."""
        longest = max(len(line.label) for line in self.lines)
        beside = longest <= _LONGEST_BESIDE
        words = max(len(line.words) for line in self.lines) * _LETTER
        left = longest * _LETTER + 12 if beside else 8
        step = 24.0 if beside else 36.0
        bottom = 4.0 + len(self.lines) * step
        text = "; ".join(f"{line.label}: {line.words}" for line in self.lines)
        drawing = Drawing(key, bottom + 20, title=self.title, description=text)
        scale = scale_over(self._values(), left, WIDTH - words - 12)
        axis_below(drawing, scale, bottom, self.unit)
        for index, line in enumerate(self.lines):
            middle = 4 + step * (index + 1) - 12
            _draw_line(drawing, scale, line, middle)
            drawing.text(0, middle + 4 if beside else middle - 10, line.label)
            drawing.text(WIDTH, middle + 4, line.words, f"num {line.tone}", "end")
        drawing.line(scale(self.neutral), 0, scale(self.neutral), bottom, "neutral")
        return drawing.markup()

    def _values(self) -> list[float]:
        ends = [(line.low, line.value, line.high, *(line.noise or ())) for line in self.lines]
        return [self.neutral, *(value for values in ends for value in values)]


def _draw_line(drawing: Drawing, scale: Scale, line: IntervalLine, y: float) -> None:
    if line.noise is not None:
        low, high = map(scale, line.noise)
        drawing.rect(low, y - 10, high - low, 20, "noise")
    low, high = scale(line.low), scale(line.high)
    drawing.line(low, y, high, y, f"bar {line.tone}")
    for end in (low, high):
        drawing.line(end, y - 4, end, y + 4, f"bar {line.tone}")
    drawing.mark(scale(line.value), y, line.tone, f"{line.label}: {line.words}", radius=4)


Chart = CellMap | Intervals
"""What draws itself under a key that no other drawing of the page has."""
