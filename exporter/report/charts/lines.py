"""Several lines over the same few places, or over values: series, ways of dropping, positions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from exporter.report.charts.axes import (
    LEFT,
    TOP,
    Scale,
    axis_below,
    axis_left,
    axis_names,
    scale_over,
    tick_text,
)
from exporter.report.charts.drawing import WIDTH, Drawing, polyline

_BOTTOM = 190.0
_MARGIN, _MARGIN_OF_NAMES = 14, 66  # to the right
_LABEL_GAP = 12.0
_MOST_LABELS = 8
_MOST_LARGE = 16  # points of a line that are drawn large
_LABEL_CHARACTERS = 42  # of all labels below together
_DASHES = ("", "7 3", "2 3", "8 3 2 3", "12 3")


@dataclass(frozen=True)
class LinePoint:
    """A figure at a place, and how far its 95 % interval reaches.

    The place is a number of the chart's places; where it has none, a value of its own.
    """

    place: float
    value: float
    tip: str = ""
    ci95: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """A line's name, the class of its colour, and its points from left to right."""

    name: str
    colour: str
    points: Sequence[LinePoint]


@dataclass(frozen=True)
class Lines:
    """Named places are equally far apart, and each line is named at its end.

    Attributes:
        title: What it is.
        lines: Those without a point are left out.
        across: What the places are.
        up: What the values are.
        places: What stands below, from left to right; none where places are values.
        unit: Of places that are values.
        logarithmic: Whether equal ratios are equally far apart.
        limits: Values that the scale upwards has to hold.
        marked: Whether each point has a mark.
        description: What it shows, in words; by default every value.
    """

    title: str
    lines: Sequence[Line]
    across: str
    up: str
    places: Sequence[str] = ()
    unit: str = ""
    logarithmic: bool = False
    limits: Sequence[float] = ()
    marked: bool = True
    description: str = ""

    def draw(self, key: str) -> Markup:
        """The drawing."""
        kept = [line for line in self.lines if line.points]
        told = self.description or self._values_in_words(kept)
        drawing = Drawing(key, _BOTTOM + 36, title=self.title, description=told)
        end = WIDTH - (_MARGIN_OF_NAMES if any(line.name for line in kept) else _MARGIN)
        values = [v for line in kept for p in line.points for v in (p.value, *(p.ci95 or ()))]
        ends = [*values, *self.limits]
        up = scale_over(ends, _BOTTOM, TOP, logarithmic=self.logarithmic)
        axis_left(drawing, up, end)
        right = self._scale_across(drawing, kept, end)
        drawing.line(LEFT, _BOTTOM, end, _BOTTOM, "axis")
        axis_names(drawing, self.up, self.across, end, _BOTTOM)
        for number, line in enumerate(kept):
            self._draw_line(drawing, line, _DASHES[number % len(_DASHES)], right, up)
        heights = _apart([up(line.points[-1].value) for line in kept])
        for line, y in zip(kept, heights, strict=True):
            if line.name:
                drawing.text(end + 7, y + 3.5, line.name, line.colour)
        return drawing.markup()

    def _scale_across(self, drawing: Drawing, lines: Sequence[Line], end: float) -> Scale:
        """The scale to the right, drawn with its ticks or the places' names."""
        if not self.places:
            values = [point.place for line in lines for point in line.points]
            scale = scale_over([0.0, *values], LEFT, end, margin=0.03)
            axis_below(drawing, scale, _BOTTOM, unit=self.unit, top=TOP)
            return scale
        middle, margin = (LEFT + end) / 2, 10.0
        scale = Scale(0, len(self.places) - 1, LEFT + margin, end - margin)
        if len(self.places) == 1:
            scale = Scale(0, 1, middle, middle)
        for place in _labelled(self.places):
            drawing.text(scale(place), _BOTTOM + 13, self.places[place], "tick", "middle")
        return scale

    def _draw_line(self, drawing: Drawing, line: Line, dash: str, right: Scale, up: Scale) -> None:
        dashed = {"stroke_dasharray": dash} if dash else {}
        at = [(right(point.place), up(point.value)) for point in line.points]
        radius = 3.5 if len(at) <= _MOST_LARGE else 2.0
        drawing.add("path", cls=f"curve {line.colour}", d=polyline(at), **dashed)
        for point, (x, y) in zip(line.points, at, strict=True):
            if point.ci95 is not None:
                drawing.line(x, up(point.ci95[0]), x, up(point.ci95[1]), f"bar {line.colour}")
            if self.marked:
                drawing.mark(x, y, line.colour, point.tip, radius=radius)

    def _values_in_words(self, lines: Sequence[Line]) -> str:
        def place(point: LinePoint) -> str:
            return self.places[int(point.place)] if self.places else tick_text(point.place)

        told = [
            f"{line.name or self.up}: "
            + ", ".join(f"{place(point)}: {tick_text(point.value)}" for point in line.points)
            for line in lines
        ]
        return ". ".join(told) + "." if told else "Nothing was measured."


def _labelled(places: Sequence[str]) -> list[int]:
    """Which places have room for their names."""
    widest = max(map(len, places), default=1) + 1
    most = max(2, min(_MOST_LABELS, _LABEL_CHARACTERS // widest))
    every = max(1, -(-(len(places) - 1) // (most - 1)))
    return list(range(0, len(places), every))


def _apart(heights: Sequence[float]) -> list[float]:
    """The same heights, moved as little as keeps the labels from lying on one another."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    found = list(heights)
    for one, other in itertools.pairwise(order):
        found[other] = max(found[other], found[one] + _LABEL_GAP)
    beyond = max([0.0, *(y - _BOTTOM for y in found)])
    for place, index in reversed(list(enumerate(order))):
        above = found[order[place + 1]] - _LABEL_GAP if place + 1 < len(order) else _BOTTOM
        found[index] = min(found[index], above) if beyond else found[index]
    return found
