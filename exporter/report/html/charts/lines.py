"""Several lines over the same few places: figures of a series, or of ways of dropping."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from exporter.report.html.charts.scale import (
    Scale,
    axis_below,
    axis_left,
    scale_over,
    tick_text,
)
from exporter.report.html.charts.svg import WIDTH, Drawing, polyline

_LEFT, _RIGHT, _TOP, _BOTTOM = 50, WIDTH - 66, 18, 190
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
    tip: str
    ci95: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """A line's name, the class of its colour, and its points from left to right."""

    name: str
    colour: str
    points: Sequence[LinePoint]


def lines_chart(
    key: str,
    lines: Sequence[Line],
    places: Sequence[str] = (),
    *,
    title: str,
    across: str,
    up: str,
    unit: str = "",
    logarithmic: bool = False,
    limits: tuple[float | None, float | None] = (None, None),
) -> Markup:
    """The drawing; named places are equally far apart, and each line is named at its end.

    Args:
        key: Its name on the page.
        lines: Those without a point are left out.
        places: What stands below, from left to right; none where places are values.
        title: What it is.
        across: What the places are.
        up: What the values are.
        unit: Of places that are values.
        logarithmic: Whether equal ratios are equally far apart; the values are then above 0.
        limits: Values that the scale has to hold; None where the points alone decide.
    """
    kept = [line for line in lines if line.points]
    drawing = Drawing(key, _BOTTOM + 36, title=title, description=_description(kept, places))
    scale = _Upwards(drawing, kept, limits, logarithmic=logarithmic)
    right = _across(drawing, kept, places, unit)
    drawing.line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "axis")
    drawing.text(0, 10, up, "tick")
    drawing.text((_LEFT + _RIGHT) / 2, _BOTTOM + 30, across, "tick", "middle")
    ends = []
    for number, line in enumerate(kept):
        _draw(drawing, line, _DASHES[number % len(_DASHES)], right, scale)
        ends.append(scale(line.points[-1].value))
    for line, y in zip(kept, _apart(ends), strict=True):
        drawing.text(_RIGHT + 7, y + 3.5, line.name, line.colour)
    return drawing.markup()


class _Upwards:
    """The scale upwards, drawn with its ticks."""

    def __init__(
        self,
        drawing: Drawing,
        lines: Sequence[Line],
        limits: tuple[float | None, float | None],
        *,
        logarithmic: bool,
    ) -> None:
        self._log = logarithmic
        values = [v for line in lines for p in line.points for v in (p.value, *(p.ci95 or ()))]
        values += [limit for limit in limits if limit is not None]
        places = [self._place(value) for value in values if not logarithmic or value > 0]
        self._scale = scale_over(places, _BOTTOM, _TOP)
        if not logarithmic:
            axis_left(drawing, self._scale, _LEFT, _RIGHT)
            return
        for tick in _log_ticks(10**self._scale.low, 10**self._scale.high):
            drawing.line(_LEFT, self(tick), _RIGHT, self(tick), "grid")
            drawing.text(_LEFT - 5, self(tick) + 3.5, tick_text(tick), "tick", "end")

    def _place(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def __call__(self, value: float) -> float:
        if self._log and value <= 0:
            return self._scale.start
        return self._scale(self._place(value))


def _log_ticks(low: float, high: float) -> list[float]:
    """Round values at equal ratios: powers of ten, with 2 and 5 or finer where those are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [
            step * 10.0**power
            for power in range(first, last + 1)
            for step in steps
            if low <= step * 10.0**power <= high
        ]
        if len(found) >= 3:
            return found[:: -(-len(found) // 6)]
    inside = Scale(low, high, 0, 1).ticks(4)
    return [tick for tick in inside if tick > 0]


def _across(drawing: Drawing, lines: Sequence[Line], places: Sequence[str], unit: str) -> Scale:
    """The scale to the right, drawn with its ticks or the places' names."""
    if not places:
        values = [point.place for line in lines for point in line.points]
        scale = scale_over([0.0, *values], _LEFT, _RIGHT, margin=0.03)
        axis_below(drawing, scale, _BOTTOM, unit=unit, top=_TOP)
        return scale
    middle, margin = (_LEFT + _RIGHT) / 2, 10.0
    scale = Scale(0, len(places) - 1, _LEFT + margin, _RIGHT - margin)
    if len(places) == 1:
        scale = Scale(0, 1, middle, middle)
    for place in _labelled(places):
        drawing.text(scale(place), _BOTTOM + 13, places[place], "tick", "middle")
    return scale


def _labelled(places: Sequence[str]) -> list[int]:
    """Which places have room for their names."""
    widest = max(map(len, places), default=1) + 1
    most = max(2, min(_MOST_LABELS, _LABEL_CHARACTERS // widest))
    every = max(1, -(-(len(places) - 1) // (most - 1)))
    return list(range(0, len(places), every))


def _draw(drawing: Drawing, line: Line, dash: str, right: Scale, up: _Upwards) -> None:
    dashed = {"stroke_dasharray": dash} if dash else {}
    at = [(right(point.place), up(point.value)) for point in line.points]
    radius = 3.5 if len(at) <= _MOST_LARGE else 2.0
    drawing.add("path", cls=f"curve {line.colour}", d=polyline(at), **dashed)
    for point, (x, y) in zip(line.points, at, strict=True):
        if point.ci95 is not None:
            drawing.line(x, up(point.ci95[0]), x, up(point.ci95[1]), f"bar {line.colour}")
        drawing.add("circle", cls=f"dot {line.colour}", cx=x, cy=y, r=radius, tip=point.tip)


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


def _description(lines: Sequence[Line], places: Sequence[str]) -> str:
    told = []
    for line in lines:
        values = ", ".join(
            f"{places[int(p.place)] if places else tick_text(p.place)}: {tick_text(p.value)}"
            for p in line.points
        )
        told.append(f"{line.name}: {values}.")
    return " ".join(told) or "Nothing was measured."
