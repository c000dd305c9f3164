"""What a recorded row says of any two of its arms."""

from __future__ import annotations

from exporter.artifacts import LatencyRow, LatencySamples, Speedup
from exporter.compare.measure.statistics import as_rounds, paired_speedup
from exporter.compare.measure.timing.rounds import TURNS


def times_of(row: LatencyRow) -> dict[str, LatencySamples]:
    """All arms' times, by name."""
    return {"baseline": row.baseline, "candidate": row.candidate, **row.references}


def speedup_between(row: LatencyRow, first: str, second: str) -> Speedup:
    """How much faster one arm is than another, as the row's own speedup is computed.

    Args:
        row: Timed here, not imported. For an interval that counts loads, both arms were loaded
            anew when the first two were.
        first: The name of the arm that is to be beaten.
        second: The other's.
    """
    times = times_of(row)
    return paired_speedup(
        as_rounds(times[first], row.rounds),
        as_rounds(times[second], row.rounds),
        seed=0,
        turns=TURNS,
        groups=row.builds if row.builds > 1 else row.loads,
        alternating=row.loads > 1 and row.builds == 1,
    )
