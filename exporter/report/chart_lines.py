"""Several lines over the same few places, or over values: series, ways of dropping, positions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from exporter.report.drawing import (
    LEFT,
    TOP,
    WIDTH,
    Drawing,
    Scale,
    axis_below,
    axis_left,
    axis_names,
    dots,
    polyline,
    scale_over,
    tick_text,
)
from exporter.report.words import milliseconds

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
    """Named places are equally far apart, and each line is named at its end."""

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


_LONGEST_BESIDE = 18
_CHARACTER = 6.3


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
        words = max(len(line.words) for line in self.lines) * _CHARACTER
        left = longest * _CHARACTER + 12 if beside else 8
        step = 24.0 if beside else 36.0
        bottom = 4.0 + len(self.lines) * step
        told = "; ".join(f"{line.label}: {line.words}" for line in self.lines)
        drawing = Drawing(key, bottom + 20, title=self.title, description=told)
        scale = scale_over(self._values(), left, WIDTH - words - 12)
        axis_below(drawing, scale, bottom, unit=self.unit)
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


MOST_POINTS = 150
_GOLDEN = 0.618033988749895  # its multiples spread evenly, and look random
_STRIP = 44.0

Times = NDArray[np.float64]


@dataclass(frozen=True)
class Samples:
    """Times of several arms."""

    title: str
    # name, class of the colour, and times in milliseconds
    arms: Sequence[tuple[str, str, Sequence[float]]]
    most: int = MOST_POINTS

    def draw(self, key: str) -> Markup:
        """The drawing."""
        arms = [(name, cls, np.sort(np.asarray(times))) for name, cls, times in self.arms]
        bottom = 4.0 + _STRIP * len(arms)
        told = ". ".join(f"{name}: {_words(times)}" for name, _, times in arms)
        drawing = Drawing(key, bottom + 20, title=self.title, description=told)
        scale = _scale([times for _, _, times in arms])
        axis_below(drawing, scale, bottom, unit=" ms")
        for index, (name, cls, times) in enumerate(arms):
            y = 4 + _STRIP * index
            drawing.text(0, y + 10, name, cls)
            if beyond := int((times > scale.high).sum()):
                words = f"{beyond:,} slower, up to {milliseconds(float(times[-1]))} ms →"
                drawing.text(WIDTH, y + 10, words, "tick", "end")
            self._strip(drawing, scale, times, y + 28, cls)
        return drawing.markup()

    def _strip(self, drawing: Drawing, scale: Scale, times: Times, y: float, cls: str) -> None:
        shown = enumerate(map(float, thinned(times[times <= scale.high], self.most)))
        points = ((scale(value), y + 9 * (i * _GOLDEN % 1 - 0.5)) for i, value in shown)
        drawing.add("path", cls=f"dots {cls}", d=dots(points))
        p25, p50, p75, p95 = (scale(float(v)) for v in np.percentile(times, [25, 50, 75, 95]))
        drawing.rect(p25, y - 9, max(p75 - p25, 0.5), 18, f"box {cls}")
        drawing.line(p50, y - 11, p50, y + 11, f"median {cls}")
        drawing.line(p75, y, p95, y, f"bar {cls}")
        drawing.line(p95, y - 5, p95, y + 5, f"bar {cls}")


def thinned(values: Times, most: int) -> Times:
    """At most so many of sorted values: the least, the greatest, and even ranks between."""
    if len(values) <= most:
        return values
    picked: Times = values[np.linspace(0, len(values) - 1, most).round().astype(int)]
    return picked


def _scale(sorted_ms: Sequence[Times]) -> Scale:
    """Up to a little beyond the slowest 99th percentile: a rare outlier would squeeze the rest."""
    low = min(float(times[0]) for times in sorted_ms)
    high = max(float(np.percentile(times, 99)) for times in sorted_ms)
    spread = (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - 0.03 * spread, high + 0.05 * spread, 6, WIDTH - 6)


def _words(times: Times) -> str:
    p50, p95, p99 = (milliseconds(float(v)) for v in np.percentile(times, [50, 95, 99]))
    return f"median {p50} ms, 95th percentile {p95} ms, 99th {p99} ms"
