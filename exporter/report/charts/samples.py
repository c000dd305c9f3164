"""Every arm's raw times at one shape: a strip of points, and a box over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from exporter.report.charts.axes import Scale, axis_below
from exporter.report.charts.drawing import WIDTH, Drawing, dots
from exporter.report.words import milliseconds

MOST_POINTS = 150
_GOLDEN = 0.618033988749895  # its multiples spread evenly, and look random
_STRIP = 44.0

Times = NDArray[np.float64]


@dataclass(frozen=True)
class Samples:
    """Times of several arms.

    Attributes:
        title: What it is.
        arms: Name, class of the colour, and times in milliseconds.
        most: Points an arm; more are thinned out evenly by rank, the ends kept.
    """

    title: str
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
