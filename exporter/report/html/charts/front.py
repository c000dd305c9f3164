"""A Pareto front: what each plan of a search gains, against what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from exporter.printable import counted
from exporter.report.html.charts.scale import axis_below, axis_left, scale_over
from exporter.report.html.charts.svg import WIDTH, Drawing, polyline

_LEFT, _RIGHT, _TOP, _BOTTOM = 50, WIDTH - 14, 18, 210
_MOST_COST = 3.0
"""Plans that cost more than so many times the median are drawn at the edge."""


@dataclass(frozen=True)
class FrontPoint:
    """A plan: what it gains, what it costs, whether anything beats it, what it drops."""

    gain: float
    cost: float
    on_front: bool
    tip: str


def front_chart(
    key: str, points: Sequence[FrontPoint], *, across: str, cost: str, unit: str, start: float
) -> Markup:
    """The drawing; the whole model stands at ``start`` and no cost, better is lower right.

    Args:
        key: Its name on the page.
        points: At least one.
        across: What stands to the right.
        cost: What stands upwards.
        unit: Of the cost.
        start: The whole model's gain.
    """
    right = scale_over([start, *(p.gain for p in points)], _LEFT, _RIGHT)
    costs = sorted(p.cost for p in points)
    most = _MOST_COST * max(costs[len(costs) // 2], 0.0)
    up = scale_over([0.0, *(c for c in costs if c <= most or not most)], _BOTTOM, _TOP, margin=0.1)
    drawing = Drawing(
        key, _BOTTOM + 36, title="Pareto front", description=_description(points, unit)
    )
    axis_left(drawing, up, _LEFT, _RIGHT, unit=unit)
    axis_below(drawing, right, _BOTTOM, top=_TOP)
    drawing.text(0, 10, cost, "tick")
    drawing.text((_LEFT + _RIGHT) / 2, _BOTTOM + 30, across, "tick", "middle")
    line = [(right(start), up(0.0))]
    line += [(right(p.gain), up(p.cost)) for p in points if p.on_front]
    drawing.add("path", cls="front", d=polyline(line))
    drawing.add("circle", cls="dot baseline", cx=right(start), cy=up(0.0), r=5, tip="whole model")
    for point in points:
        cls, radius = ("dot candidate", 4.5) if point.on_front else ("dot even", 3)
        drawing.add(
            "circle", cls=cls, cx=right(point.gain), cy=up(point.cost), r=radius, tip=point.tip
        )
    return drawing.markup()


def _description(points: Sequence[FrontPoint], unit: str) -> str:
    led = [f"{p.gain:.3g}: {p.cost:.3g}{unit}" for p in points if p.on_front]
    return f"{counted(len(points), 'plan')}, of which nothing beats {len(led)}. {'; '.join(led)}."
