"""Estimates with their intervals, one below another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from exporter.report.drawing import (
    WIDTH,
    Drawing,
    Scale,
    axis_below,
    scale_over,
)

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
        text = "; ".join(f"{line.label}: {line.words}" for line in self.lines)
        drawing = Drawing(key, bottom + 20, title=self.title, description=text)
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
