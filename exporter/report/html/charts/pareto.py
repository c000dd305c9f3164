"""What speed costs: every candidate's speedup against its loss in quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from exporter.report.html.charts.labels import Box, Label, Named, place_labels
from exporter.report.html.charts.scale import Scale, axis_below, axis_left, scale_over
from exporter.report.html.charts.svg import WIDTH, Drawing, polyline

_LEFT, _RIGHT, _TOP, _BOTTOM = 50, WIDTH - 14, 18, 210
SHAPES = ("circle", "square", "diamond", "triangle", "wedge")
"""Marks of the phases; letters name the candidates."""


@dataclass(frozen=True)
class Candidate:
    """A point: its letter, its phase (by number), its speedup with a range, its cost."""

    letter: str
    phase: int
    speedup: float
    low: float
    high: float
    cost: float


def pareto_chart(key: str, points: Sequence[Candidate], *, cost: str, unit: str) -> Markup:
    """The drawing; the baseline stands at a speedup of 1 and no cost, better is lower right.

    Args:
        key: Its name.
        points: A phase's points are joined where there are several.
        cost: What stands upwards.
        unit: Of the cost.
    """
    across = scale_over([1.0, *(v for p in points for v in (p.low, p.high))], _LEFT, _RIGHT)
    up = scale_over([0.0, *(p.cost for p in points)], _BOTTOM, _TOP, margin=0.1)
    words = "; ".join(f"{p.letter}: {p.speedup:.3f} times, {p.cost:.4g}{unit}" for p in points)
    drawing = Drawing(
        key, _BOTTOM + 36, title="What speed costs", description=f"Baseline: 1 time, 0. {words}."
    )
    axis_left(drawing, up, _LEFT, _RIGHT, unit=unit)
    axis_below(drawing, across, _BOTTOM, unit="x", top=_TOP)
    drawing.text(0, 10, cost, "tick")
    drawing.text((_LEFT + _RIGHT) / 2, _BOTTOM + 30, "speedup (more is better)", "tick", "middle")
    for phase in sorted({point.phase for point in points}):
        _front(drawing, across, up, [point for point in points if point.phase == phase])
    drawing.add("circle", cls="dot baseline", cx=across(1), cy=up(0), r=5, tip="baseline")
    drawing.text(across(1) + 8, up(0) + 12, "baseline", "baseline")
    labels = _labels(across, up, points)
    for label in labels:
        if label.far:
            drawing.line(label.mark.x, label.mark.y, label.x, label.y, "grid")
    for point in points:
        _point(drawing, across, up, point)
    for label in labels:  # over all marks
        drawing.text(label.x, label.y + 4, label.mark.name, "candidate strong", "middle")
    return drawing.markup()


def pareto_front(points: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in both, slowest first."""
    best: list[Candidate] = []
    for point in sorted(points, key=lambda p: (-p.speedup, p.cost)):
        if not best or point.cost < best[-1].cost:
            best.append(point)
    return best[::-1]


def _front(drawing: Drawing, across: Scale, up: Scale, points: Sequence[Candidate]) -> None:
    if len(points) < 2:
        return
    front = pareto_front(points)
    line = [(across(1), up(0)), *((across(p.speedup), up(p.cost)) for p in front if p.cost >= 0)]
    drawing.add("path", cls="front", d=polyline(line))


def _point(drawing: Drawing, across: Scale, up: Scale, point: Candidate) -> None:
    x, y = across(point.speedup), up(point.cost)
    drawing.line(across(point.low), y, across(point.high), y, "bar candidate")
    tip = f"{point.letter} {point.speedup:.3f} times as fast"
    draw_mark(drawing, point.phase, x, y, tip)


def _labels(across: Scale, up: Scale, points: Sequence[Candidate]) -> list[Label]:
    """The letters, where none hides another."""
    marks = [Named(across(p.speedup), up(p.cost), p.letter) for p in points]
    bars = [
        Box(across(p.low), mark.y - 1, across(p.high), mark.y + 1)
        for p, mark in zip(points, marks, strict=True)
    ]
    beside_baseline = Box(across(1) + 6, up(0) + 2, across(1) + 58, up(0) + 15)
    return place_labels(marks, [beside_baseline], bars, Box(_LEFT, 0, WIDTH, _BOTTOM))


def draw_mark(drawing: Drawing, phase: int, x: float, y: float, tip: str) -> None:
    """A phase's mark."""
    shape = SHAPES[phase % len(SHAPES)]
    if shape == "circle":
        drawing.add("circle", cls="dot candidate", cx=x, cy=y, r=4.5, tip=tip)
        return
    outlines: dict[str, list[tuple[float, float]]] = {
        "square": [(-4, -4), (4, -4), (4, 4), (-4, 4)],
        "diamond": [(0, -6), (6, 0), (0, 6), (-6, 0)],
        "triangle": [(0, -6), (5.5, 4), (-5.5, 4)],
        "wedge": [(0, 6), (5.5, -4), (-5.5, -4)],
    }
    path = polyline((x + dx, y + dy) for dx, dy in outlines[shape]) + "Z"
    drawing.add("path", cls="dot candidate", d=path, tip=tip)
