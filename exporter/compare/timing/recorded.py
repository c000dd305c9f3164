"""What a recorded row says of any two of its arms."""

from __future__ import annotations

from typing import Any

from exporter.artifacts import LatencyRow, LatencySamples, Speedup
from exporter.compare.timing.rounds import TURNS
from exporter.compare.timing.statistics import (
    Estimate,
    as_rounds,
    estimate,
    log_ratios,
    paired_speedup,
)


def times_of(row: LatencyRow) -> dict[str, LatencySamples]:
    """All arms' times, by name."""
    return {"baseline": row.baseline, "candidate": row.candidate, **row.references}


def estimate_between(row: LatencyRow, first: str, second: str) -> Estimate:
    """How much faster one arm is than another, as the row's own speedup is computed.

    Args:
        row: Timed here, not imported. For an interval that counts loads, both arms were loaded
            anew when the first two were.
        first: The name of the arm that is to be beaten.
        second: The other's.
    """
    return estimate(log_ratios(*_rounds(row, first, second), turns=TURNS), **_grouping(row))


def speedup_between(row: LatencyRow, first: str, second: str) -> Speedup:
    """The same with the interval of the row's own speedup."""
    return paired_speedup(*_rounds(row, first, second), seed=0, turns=TURNS, **_grouping(row))


def _rounds(row: LatencyRow, first: str, second: str) -> list[Any]:
    times = times_of(row)
    return [as_rounds(times[name], row.rounds) for name in (first, second)]


def _grouping(row: LatencyRow) -> dict[str, Any]:
    return {
        "groups": row.builds if row.builds > 1 else row.loads,
        "alternating": row.loads > 1 and row.builds == 1,
    }
