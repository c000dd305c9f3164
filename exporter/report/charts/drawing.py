"""Writes SVG: marks, text, all escaped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from markupsafe import Markup, escape

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
    """A drawing that also says in words what it shows.

    Args:
        key: A name that no other drawing of the page has.
        height: In units.
        title: What it is.
        description: What it shows, for those who don't see it.
    """

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


def dots(points: Iterable[tuple[float, float]]) -> str:
    """A path of many dots: with round ends a line of no length is one, in a dozen bytes."""
    return "".join(f"M{number(x)} {number(y)}h0" for x, y in points)


def polyline(points: Iterable[tuple[float, float]]) -> str:
    """A path through the points."""
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)


def number(value: float) -> str:
    """A coordinate, to a tenth of a unit."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _value(value: str | float) -> Markup:
    return escape(value if isinstance(value, str) else number(value))
