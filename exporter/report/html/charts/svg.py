"""Writes SVG: elements, attributes, text, all escaped."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup, escape

WIDTH = 360
"""Units from left to right in every drawing; a unit is a CSS pixel on a phone."""


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
        self.add("path", cls=cls, d=f"M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}")

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
