"""Times a request with two arms in turns, until it is known well enough or the time is up."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from exporter.artifacts import LatencyRow
from exporter.artifacts.latency import Shape
from exporter.choose.costs.estimates import RequestEstimate, so_far
from exporter.compare.timing.clock import Clocks
from exporter.compare.timing.measuring import TimingBudget, measure_rows
from exporter.compare.timing.row import MeasuredRow
from exporter.compare.timing.subjects import TimedArm
from exporter.progress import QUIET, Progress

_WARM_UP_SECONDS = 10.0
_RELOADED_SECONDS = 20.0  # with less time loading anew would leave none for rounds
_FEWEST_PARTS = 6  # between loads: an interval of fewer says nothing


@dataclass(frozen=True)
class Effort:
    """How long a request is timed.

    Attributes:
        seconds: What all its cells may take together, warming up and loading anew included. It
            ends with the rounds in which they are up, after two of each cell.
        rounds: Takes so many rounds of each cell instead, whatever they take and show.
        reload: Whether arms are loaded anew again and again, where that isn't too slow.
        clocks: What times; None for the machine's own.
        seed: For the arms' order in each round.
    """

    seconds: float = 60.0
    rounds: int | None = None
    reload: bool = True
    clocks: Clocks | None = None
    seed: int = field(default_factory=lambda: secrets.randbits(32))


def time_request(
    arms: Mapping[str, TimedArm],
    cells: Sequence[tuple[Shape, float]],
    effort: Effort,
    known: Callable[[RequestEstimate], bool],
    progress: Progress = QUIET,
) -> list[LatencyRow]:
    """Times all cells of a request.

    Args:
        arms: Two of them or more, loaded: the baseline first.
        cells: What is timed, and how often each counts.
        effort: How long.
        known: Whether the estimate of the first two is good enough to end.
        progress: Hears what goes on.

    Returns:
        A row for each cell.

    Raises:
        BackendError: A run fails.
        ComparisonError: The clock jumps, or an input's meaning isn't known.
    """
    counts = [count for _, count in cells]

    def enough(rows: Sequence[MeasuredRow]) -> bool:
        whole = all(len(row.chunks) >= _FEWEST_PARTS for row in rows)
        return whole and known(so_far(rows, counts))

    seconds = effort.seconds / len(cells)
    sampling = TimingBudget(
        seconds=seconds,
        wall_seconds=None if effort.rounds is not None else effort.seconds,
        rounds=effort.rounds,
        warmup_seconds=min(_WARM_UP_SECONDS, seconds),
        reload=effort.reload and (effort.rounds is not None or effort.seconds > _RELOADED_SECONDS),
        seed=effort.seed,
    )
    return measure_rows(
        arms,
        [shape for shape, _ in cells],
        sampling,
        clocks=effort.clocks,
        enough=None if effort.rounds is not None else enough,
        progress=progress,
    )
