"""From values to places: linear and logarithmic scales, and round numbers along them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from exporter.report.html.charts.svg import Drawing
from exporter.report.words import significant

_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Scale:
    """A linear scale: ``low`` stands at ``start``, ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value; what lies beyond the ends is held there."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values between the ends, at most so many."""
        span = self.high - self.low
        magnitude = 10.0 ** math.floor(math.log10(span / most))
        step = next(s * magnitude for s in _STEPS if span / (s * magnitude) <= most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def scale_over(values: list[float], start: float, end: float, *, margin: float = 0.06) -> Scale:
    """A scale with a margin around the finite values; one without extent is given some."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    spread = (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - margin * spread, high + margin * spread, start, end)


def axis_below(drawing: Drawing, scale: Scale, y: float, *, unit: str = "", top: float = 0) -> None:
    """Ticks with their numbers under a plot, and faint lines up to ``top``."""
    for tick in scale.ticks():
        drawing.line(scale(tick), top, scale(tick), y, "grid")
        drawing.text(scale(tick), y + 13, tick_text(tick) + unit, "tick", "middle")


def axis_left(drawing: Drawing, scale: Scale, x: float, right: float, *, unit: str = "") -> None:
    """Ticks with their numbers to the left of a plot, and faint lines across it."""
    for tick in scale.ticks(4):
        drawing.line(x, scale(tick), right, scale(tick), "grid")
        drawing.text(x - 5, scale(tick) + 3.5, tick_text(tick) + unit, "tick", "end")


def tick_text(value: float) -> str:
    """A round number without needless zeros."""
    text = f"{value:.10g}"
    return text if len(text) <= 7 else significant(value, 3)
