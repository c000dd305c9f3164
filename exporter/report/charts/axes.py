"""From values to places: linear and logarithmic scales, round numbers along them, and axes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from exporter.report.charts.drawing import Drawing
from exporter.report.words import significant

LEFT, TOP = 50.0, 18.0
"""Where a plot begins."""
_STEPS = (1, 2, 2.5, 5, 10)
_LOGARITHMIC_STEPS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))


@dataclass(frozen=True)
class Scale:
    """A scale: ``low`` stands at ``start``, ``high`` at ``end``.

    On a logarithmic one equal ratios are equally far apart; 0 and less stand at ``start``.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; what lies beyond the ends is held there."""
        if self.logarithmic and value <= 0:
            return self.start
        low, high, at = map(self._measured, (self.low, self.high, value))
        share = (at - low) / (high - low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values between the ends, at most so many."""
        if self.logarithmic and (found := self._logarithmic_ticks()):
            return found
        span = self.high - self.low
        magnitude = 10.0 ** math.floor(math.log10(span / most))
        step = next(s * magnitude for s in _STEPS if span / (s * magnitude) <= most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def _measured(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def _logarithmic_ticks(self) -> list[float]:
        """Powers of ten, with 2 and 5 or finer where those are few; none where all are."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in _LOGARITHMIC_STEPS:
            values = (step * 10.0**power for power in powers for step in steps)
            found = [value for value in values if self.low <= value <= self.high]
            if len(found) >= 3:
                return found[:: -(-len(found) // 6)]
        return []


def scale_over(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    margin: float = 0.06,
    logarithmic: bool = False,
) -> Scale:
    """A scale with a margin around the finite values; one without extent is given some."""
    finite = [value for value in values if math.isfinite(value)]
    if logarithmic:
        finite = [math.log10(value) for value in finite if value > 0]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    spread = (high - low) or abs(high) * 0.1 or 1.0
    ends = (low - margin * spread, high + margin * spread)
    if logarithmic:
        ends = (10 ** ends[0], 10 ** ends[1])
    return Scale(*ends, start, end, logarithmic)


def axis_below(drawing: Drawing, scale: Scale, y: float, *, unit: str = "", top: float = 0) -> None:
    """Ticks with their numbers under a plot, and faint lines up to ``top``."""
    for tick in scale.ticks():
        drawing.line(scale(tick), top, scale(tick), y, "grid")
        drawing.text(scale(tick), y + 13, tick_text(tick) + unit, "tick", "middle")


def axis_left(drawing: Drawing, scale: Scale, right: float, *, unit: str = "") -> None:
    """Ticks with their numbers to the left of a plot, and faint lines across it."""
    for tick in scale.ticks(4):
        drawing.line(LEFT, scale(tick), right, scale(tick), "grid")
        drawing.text(LEFT - 5, scale(tick) + 3.5, tick_text(tick) + unit, "tick", "end")


def axis_names(drawing: Drawing, up: str, across: str, right: float, bottom: float) -> None:
    """What the values upwards and to the right are."""
    drawing.text(0, 10, up, "tick")
    drawing.text((LEFT + right) / 2, bottom + 30, across, "tick", "middle")


def tick_text(value: float) -> str:
    """A round number without needless zeros."""
    text = f"{value:.10g}"
    return text if len(text) <= 7 else significant(value, 3)
