"""A curve as one line of text, for where nothing can be drawn."""

from __future__ import annotations

from collections.abc import Collection, Sequence

_BARS = "▁▂▃▄▅▆▇█"
_STEP = "┊"


def sparkline(values: Sequence[float], steps: Collection[int] = (), *, least: float = 0.0) -> str:
    """Bars between the lowest and the highest value, with a mark before each step.

    Args:
        values: From left to right.
        steps: Places of first values of a new level.
        least: A range that fills all heights; noise below it stays low.
    """
    if not values:
        return ""
    low, high = min(values), max(values)
    missing = max(least - (high - low), 0.0) / 2
    low, high = low - missing, high + missing
    bars = [
        _BARS[round((value - low) / (high - low) * (len(_BARS) - 1))] if high > low else _BARS[0]
        for value in values
    ]
    return "".join(_STEP * (place in steps) + bar for place, bar in enumerate(bars))
