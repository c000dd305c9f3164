"""Writes SVG: marks, text, all escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from markupsafe import Markup, escape

from exporter.report.words import significant

WIDTH = 360
"""Units from left to right in every drawing; a unit is a CSS pixel on a phone."""
SHAPES: dict[str, list[tuple[float, float]]] = {
    "circle": [],
    "square": [(-4, -4), (4, -4), (4, 4), (-4, 4)],
    "diamond": [(0, -6), (6, 0), (0, 6), (-6, 0)],
    "triangle": [(0, -6), (5.5, 4), (-5.5, 4)],
    "wedge": [(0, 6), (5.5, -4), (-5.5, -4)],
}
"""Outlines of marks, around their middle."""


class Chart(Protocol):
    """Anything that draws itself."""

    def draw(self, key: str) -> Markup:
        """The drawing.

        Args:
            key: A name that no other drawing of the page has.
        """


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

    def mark(
        self, x: float, y: float, cls: str, tip: str = "", *, radius: float = 4.5, shape: str = ""
    ) -> None:
        """A filled mark: a circle, or one of :data:`SHAPES`."""
        if outline := SHAPES.get(shape):
            path = polyline((x + dx, y + dy) for dx, dy in outline) + "Z"
            self.add("path", cls=f"dot {cls}", d=path, tip=tip)
        else:
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


LEFT, TOP = 50.0, 18.0
"""Where a plot begins."""
_STEPS = (1, 2, 2.5, 5, 10)


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


def scale_over(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    margin: float = 0.06,
) -> Scale:
    """A scale with a margin around the finite values; one without extent is given some."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    spread = (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - margin * spread, high + margin * spread, start, end)


def axis_below(drawing: Drawing, scale: Scale, y: float, *, unit: str = "", top: float = 0) -> None:
    """Ticks with their numbers under a plot, and faint lines up to ``top``."""
    for tick in scale.ticks():
        drawing.line(scale(tick), top, scale(tick), y, "grid")
        drawing.text(scale(tick), y + 13, tick_text(tick) + unit, "tick", "middle")


def axis_left(drawing: Drawing, scale: Scale, right: float, *, unit: str = "") -> None:
    """Ticks with their numbers to the left of a plot, and faint lines across it."""
    for tick in scale.ticks(4):
        drawing.line(LEFT, scale(tick), right, scale(tick), "grid")
        drawing.text(LEFT - 5, scale(tick) + 3.5, tick_text(tick) + unit, "tick", "end")


def axis_names(drawing: Drawing, up: str, across: str, right: float, bottom: float) -> None:
    """What the values upwards and to the right are."""
    drawing.text(0, 10, up, "tick")
    drawing.text((LEFT + right) / 2, bottom + 30, across, "tick", "middle")


def tick_text(value: float) -> str:
    """A round number without needless zeros."""
    text = f"{value:.10g}"
    return text if len(text) <= 7 else significant(value, 3)
