"""Every arm's raw times at one shape: a strip of points, and a box over them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from exporter.artifacts import LatencyRow, LatencySamples
from exporter.report.html.charts.scale import Scale, axis_below
from exporter.report.html.charts.svg import WIDTH, Drawing, dots
from exporter.report.words import milliseconds, shape_words

MOST_POINTS = 150
_GOLDEN = 0.618033988749895  # its multiples spread evenly, and look random


def timed_arms(row: LatencyRow) -> list[tuple[str, str, LatencySamples]]:
    """Name, class and times of each arm."""
    known = [("baseline", "baseline", row.baseline), ("candidate", "candidate", row.candidate)]
    others = [
        (name, f"ref{i % 4}", times) for i, (name, times) in enumerate(row.references.items())
    ]
    return known + others


def sample_chart(key: str, row: LatencyRow, *, most: int = MOST_POINTS) -> Markup:
    """The drawing.

    Args:
        key: Its name.
        row: The shape; arms without samples are drawn by their percentiles alone.
        most: Points an arm; more are thinned out evenly by rank, the ends kept.
    """
    arms = timed_arms(row)
    sorted_ms = [_sorted(times) for _, _, times in arms]
    bottom = 4.0 + 44 * len(arms)
    drawing = Drawing(key, bottom + 20, title=f"Times, {shape_words(row)}", description=_words(row))
    scale = _scale(sorted_ms)
    axis_below(drawing, scale, bottom, unit=" ms")
    for index, ((name, cls, _), times) in enumerate(zip(arms, sorted_ms, strict=True)):
        y = 4 + 44 * index
        drawing.text(0, y + 10, name, cls)
        _beyond(drawing, scale, times, y)
        _strip(drawing, scale, times, y + 28, cls, most)
    return drawing.markup()


def thinned(values: NDArray[np.float64], most: int) -> NDArray[np.float64]:
    """At most so many of sorted values: the least, the greatest, and even ranks between."""
    if len(values) <= most:
        return values
    picked: NDArray[np.float64] = values[np.linspace(0, len(values) - 1, most).round().astype(int)]
    return picked


def _sorted(times: LatencySamples) -> NDArray[np.float64]:
    known = times.samples_ms or [times.p50_ms, times.p95_ms, times.p99_ms]
    return np.sort(np.asarray(known, dtype=np.float64))


def _scale(sorted_ms: Sequence[NDArray[np.float64]]) -> Scale:
    """Up to a little beyond the slowest 99th percentile: a rare outlier would squeeze the rest."""
    low = min(float(times[0]) for times in sorted_ms)
    high = max(float(np.percentile(times, 99)) for times in sorted_ms)
    spread = (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - 0.03 * spread, high + 0.05 * spread, 6, WIDTH - 6)


def _strip(
    drawing: Drawing, scale: Scale, times: NDArray[np.float64], y: float, cls: str, most: int
) -> None:
    shown = thinned(times[times <= scale.high], most)
    points = ((scale(v), y + 9 * (i * _GOLDEN % 1 - 0.5)) for i, v in enumerate(map(float, shown)))
    drawing.add("path", cls=f"dots {cls}", d=dots(points))
    p25, p50, p75, p95 = (scale(float(v)) for v in np.percentile(times, [25, 50, 75, 95]))
    drawing.add("rect", cls=f"box {cls}", x=p25, y=y - 9, width=max(p75 - p25, 0.5), height=18)
    drawing.line(p50, y - 11, p50, y + 11, f"median {cls}")
    drawing.line(p75, y, p95, y, f"bar {cls}")
    drawing.line(p95, y - 5, p95, y + 5, f"bar {cls}")


def _beyond(drawing: Drawing, scale: Scale, times: NDArray[np.float64], y: float) -> None:
    count = int((times > scale.high).sum())
    if count:
        words = f"{count:,} slower, up to {milliseconds(float(times[-1]))} ms →"
        drawing.text(WIDTH, y + 10, words, "tick", "end")


def _words(row: LatencyRow) -> str:
    return ". ".join(
        f"{name}: median {milliseconds(t.median_ms)} ms, 95th percentile "
        f"{milliseconds(t.p95_ms)} ms, 99th {milliseconds(t.p99_ms)} ms, "
        f"{len(t.samples_ms):,} samples"
        for name, _, t in timed_arms(row)
    )
