"""What speed costs: every candidate's gain against its loss in quality."""

from __future__ import annotations

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
_PLACES = ((9, -8), (-9, -8), (0, -13), (13, 3), (9, 13), (-9, 13), (-13, 3), (0, 18))
"""Where a name may stand beside its mark; the first that is free is taken."""
_WIDE, _HIGH = 7.5, 11.0  # what a name takes


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
        marks = [(right(p.gain), up(p.cost), p) for p in self.points]
        for x, y, point in marks:
            _draw_point(drawing, right, point, x, y)
        for x, y, letter in _placed_names(marks):  # over all marks
            drawing.text(x, y, letter, "candidate strong", "middle")
        return drawing.markup()

    def _scale_up(self) -> Scale:
        costs = sorted(point.cost for point in self.points)
        most = _MOST_COST * costs[len(costs) // 2] if len(costs) > _MANY else math.inf
        kept = [cost for cost in costs if cost <= most or most <= 0]
        return scale_over([0.0, *kept], _BOTTOM, TOP, margin=0.1)

    def _front(self, drawing: Drawing, right: Scale, up: Scale, series: int) -> None:
        points = [p for p in self.points if p.series == series]
        if len(points) > 1:
            best = [(p.gain, p.cost) for p in pareto_front(points) if p.cost >= 0]
            line = [(right(gain), up(cost)) for gain, cost in [(self.start, 0.0), *best]]
            drawing.add("path", cls="front", d=polyline(line))

    def _words(self) -> str:
        text = "; ".join(
            f"{p.letter or p.tip}: {p.gain:.4g}, {p.cost:.4g}{self.cost[1]}" for p in self.points
        )
        return f"{self.whole}: {self.start:g}, 0. {text}."


def _draw_point(drawing: Drawing, right: Scale, point: Candidate, x: float, y: float) -> None:
    if point.high > point.low:
        drawing.line(right(point.low), y, right(point.high), y, "bar candidate")
    tip = point.tip or f"{point.letter} {point.gain:.3f} times as fast"
    drawing.mark(x, y, "candidate", tip, shape=series_mark(point.series))


def _placed_names(
    marks: Sequence[tuple[float, float, Candidate]],
) -> Iterator[tuple[float, float, str]]:
    """Each name beside its mark, on no other name where one of the places is free."""
    taken: list[tuple[float, float]] = []
    for x, y, point in marks:
        if point.letter:
            places = [(x + across, y + down) for across, down in _PLACES]
            free = (
                (left, top)
                for left, top in places
                if all(abs(left - a) >= _WIDE or abs(top - b) >= _HIGH for a, b in taken)
            )
            taken.append(next(free, places[0]))
            yield *taken[-1], point.letter
