"""What speed costs: every candidate's gain against its loss in quality."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from exporter.report.drawing import (
    LEFT,
    SHAPES,
    TOP,
    WIDTH,
    Drawing,
    Scale,
    axis_below,
    axis_left,
    axis_names,
    polyline,
    scale_over,
)

_RIGHT, _BOTTOM = WIDTH - 14.0, 210.0
_MARKS = list(SHAPES)
_MANY, _MOST_COST = 10, 3.0
"""Of more than so many, those that cost more than so many times the median are at the edge."""
_RINGS = (10.0, 15.0, 21.0, 28.0, 36.0, 45.0)
"""How far a name may stand from its mark; the first that is free is taken."""
_ANGLES = (45, 135, 0, -45, 180, 90, -135, -90)
_HALF_HEIGHT, _LETTER, _MARK = 5.5, 7.5, 5.5
_NEAR = 15.0
"""A name further away needs a line to its mark."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Candidate:
    """A point: what it gains, with a range, and what it costs."""

    letter: str
    series: int
    gain: float
    low: float
    high: float
    cost: float
    tip: str = ""
    beaten: bool = False


def series_mark(index: int) -> str:
    """The shape of a series' marks."""
    return _MARKS[index % len(_MARKS)]


def pareto_front(points: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in both, slowest first."""
    best: list[Candidate] = []
    for point in sorted(points, key=lambda p: (-p.gain, p.cost)):
        if not best or point.cost < best[-1].cost:
            best.append(point)
    return best[::-1]


@dataclass(frozen=True)
class TradeOff:
    """Candidates and the whole model, at ``start`` and no cost; better is lower right."""

    title: str
    points: Sequence[Candidate]
    across: str
    cost: tuple[str, str]
    unit: str = "x"
    start: float = 1.0
    whole: str = "baseline"

    def draw(self, key: str) -> Markup:
        """The drawing."""
        ends = [self.start, *(v for p in self.points for v in (p.low, p.gain, p.high))]
        right, up = scale_over(ends, LEFT, _RIGHT), self._scale_up()
        name, unit = self.cost
        drawing = Drawing(key, _BOTTOM + 36, title=self.title, description=self._words())
        axis_left(drawing, up, _RIGHT, unit=unit)
        axis_below(drawing, right, _BOTTOM, unit=self.unit, top=TOP)
        axis_names(drawing, name, self.across, _RIGHT, _BOTTOM)
        for series in sorted({point.series for point in self.points}):
            self._front(drawing, right, up, series)
        x, y = right(self.start), up(0.0)
        drawing.mark(x, y, "baseline", self.whole, radius=5)
        drawing.text(x + 8, y + 12, self.whole, "baseline")
        beside_whole = (x + 6, y + 2, x + 10 + 6 * len(self.whole), y + 15)
        marks = [(right(p.gain), up(p.cost), p) for p in self.points]
        names = list(_placed_names(marks, right, beside_whole))
        for x, y, name_x, name_y, letter in names:
            if math.hypot(name_x - x, name_y - y) - _LETTER * len(letter) / 2 > _NEAR:
                drawing.line(x, y, name_x, name_y, "grid")
        for x, y, point in marks:
            _draw_point(drawing, right, point, x, y)
        for _, _, x, y, letter in names:  # over all marks
            drawing.text(x, y + 4, letter, "candidate strong", "middle")
        return drawing.markup()

    def _scale_up(self) -> Scale:
        costs = sorted(point.cost for point in self.points)
        most = _MOST_COST * costs[len(costs) // 2] if len(costs) > _MANY else math.inf
        kept = [cost for cost in costs if cost <= most or most <= 0]
        return scale_over([0.0, *kept], _BOTTOM, TOP, margin=0.1)

    def _front(self, drawing: Drawing, right: Scale, up: Scale, series: int) -> None:
        points = [p for p in self.points if p.series == series and not p.beaten]
        if len(points) > 1:
            best = [(p.gain, p.cost) for p in pareto_front(points) if p.cost >= 0]
            line = [(right(gain), up(cost)) for gain, cost in [(self.start, 0.0), *best]]
            drawing.add("path", cls="front", d=polyline(line))

    def _words(self) -> str:
        told = "; ".join(
            f"{p.letter or p.tip}: {p.gain:.4g}, {p.cost:.4g}{self.cost[1]}"
            for p in self.points
            if not p.beaten
        )
        return f"{self.whole}: {self.start:g}, 0. {told}."


def _draw_point(drawing: Drawing, right: Scale, point: Candidate, x: float, y: float) -> None:
    if point.high > point.low:
        drawing.line(right(point.low), y, right(point.high), y, "bar candidate")
    tip = point.tip or f"{point.letter} {point.gain:.3f} times as fast"
    cls, radius = ("even", 3.0) if point.beaten else ("candidate", 4.5)
    drawing.mark(x, y, cls, tip, radius=radius, shape=series_mark(point.series))


def _placed_names(
    marks: Sequence[tuple[float, float, Candidate]], right: Scale, taken: Box
) -> Iterator[tuple[float, float, float, float, str]]:
    """A place for every name: near its mark, on no other name or mark, and on no bar if it can be.

    Where nothing is free it is the usual place.
    """
    inside: Box = (LEFT, 0, WIDTH, _BOTTOM)
    bars = [(right(p.low), y - 1, right(p.high), y + 1) for _, y, p in marks]
    boxes = [taken, *(_around(x, y, _MARK, _MARK) for x, y, _ in marks)]
    for x, y, point in marks:
        if not point.letter:
            continue
        half = _LETTER * len(point.letter) / 2
        tried = [(*at, _around(*at, half, _HALF_HEIGHT)) for at in _places(x, y, half)]
        free = [t for t in tried if _holds(inside, t[2]) and not _meets_any(t[2], boxes)]
        clear = (t for t in free if not _meets_any(t[2], bars))
        name_x, name_y, box = next(clear, (free or tried)[0])
        boxes.append(box)
        yield x, y, name_x, name_y, point.letter


def _places(x: float, y: float, half: float) -> Iterator[tuple[float, float]]:
    """Middles of a name around its mark, the nearest first."""
    wider = half - _LETTER / 2
    for radius, angle in itertools.product(_RINGS, _ANGLES):
        across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        yield x + (radius + wider) * across, y - radius * up


def _around(x: float, y: float, half_width: float, half_height: float) -> Box:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _meets_any(box: Box, others: Sequence[Box]) -> bool:
    return any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
        for other in others
    )


def _holds(outer: Box, inner: Box) -> bool:
    across = outer[0] <= inner[0] and inner[2] <= outer[2]
    return across and outer[1] <= inner[1] and inner[3] <= outer[3]
