"""Estimates with their intervals, one below the other, along one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from exporter.report.html.charts.scale import Scale, axis_below, scale_over
from exporter.report.html.charts.svg import WIDTH, Drawing
from exporter.report.parts.part import Tone

_LONGEST_BESIDE = 18
_CHARACTER = 6.3


@dataclass(frozen=True)
class Estimate:
    """One line: what, its value with an interval, the value in words, how it is meant.

    ``noise`` is the range within which a value says nothing.
    """

    label: str
    value: float
    low: float
    high: float
    words: str
    tone: Tone
    noise: tuple[float, float] | None = None


def forest(
    key: str,
    estimates: Sequence[Estimate],
    *,
    neutral: float,
    title: str,
    description: str,
    unit: str = "",
) -> Markup:
    """The drawing; a line marks the ``neutral`` value, a band each line's noise."""
    beside = max(len(estimate.label) for estimate in estimates) <= _LONGEST_BESIDE
    words = max(len(estimate.words) for estimate in estimates) * _CHARACTER
    left = max(len(e.label) for e in estimates) * _CHARACTER + 12 if beside else 8
    step, bottom = (24.0 if beside else 36.0), 4.0 + len(estimates) * (24 if beside else 36)
    drawing = Drawing(key, bottom + 20, title=title, description=description)
    scale = scale_over(_values(estimates, neutral), left, WIDTH - words - 12)
    axis_below(drawing, scale, bottom, unit=unit)
    for index, estimate in enumerate(estimates):
        middle = 4 + step * (index + 1) - 12
        _noise(drawing, scale, estimate, middle)
        drawing.text(0, middle + 4 if beside else middle - 10, estimate.label)
        _interval(drawing, scale, estimate, middle)
        drawing.text(WIDTH, middle + 4, estimate.words, f"num {estimate.tone}", "end")
    drawing.line(scale(neutral), 0, scale(neutral), bottom, "neutral")
    return drawing.markup()


def _values(estimates: Sequence[Estimate], neutral: float) -> list[float]:
    values = [neutral]
    for estimate in estimates:
        values += [estimate.low, estimate.value, estimate.high, *(estimate.noise or ())]
    return values


def _noise(drawing: Drawing, scale: Scale, estimate: Estimate, y: float) -> None:
    if estimate.noise is not None:
        low, high = map(scale, estimate.noise)
        drawing.add("rect", cls="noise", x=low, y=y - 10, width=high - low, height=20)


def _interval(drawing: Drawing, scale: Scale, estimate: Estimate, y: float) -> None:
    low, high = scale(estimate.low), scale(estimate.high)
    drawing.line(low, y, high, y, f"bar {estimate.tone}")
    for end in (low, high):
        drawing.line(end, y - 4, end, y + 4, f"bar {estimate.tone}")
    drawing.add(
        "circle", cls=f"dot {estimate.tone}", cx=scale(estimate.value), cy=y, r=4,
        tip=f"{estimate.label}: {estimate.words}",
    )  # fmt: skip
