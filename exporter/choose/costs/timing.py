"""Times a request with two arms in turns, until it is known well enough or the time is up."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from exporter.artifacts import FEWEST_ROUNDS, LatencyRow, Speedup
from exporter.artifacts.latency import Shape
from exporter.compare.timing.measuring import TimingBudget, measure_rows
from exporter.compare.timing.row import MeasuredRow
from exporter.compare.timing.statistics import SpeedupEstimate, estimate_between, ratios_between
from exporter.compare.timing.subjects import Clock, TimedArm
from exporter.progress import QUIET, Progress


@dataclass(frozen=True)
class RequestEstimate:
    """Both arms' time of a request.

    The baseline's counts as known: what the two arms' rounds have in common, a busy machine for
    one, slows both, and it is the ratios that are measured.
    """

    baseline_ms: float
    variant_ms: float
    std_error_ms: float
    degrees: float

    @classmethod
    def of(
        cls,
        counts: Sequence[float],
        baselines_ms: Sequence[float],
        ratios: Sequence[SpeedupEstimate],
    ) -> RequestEstimate:
        """Sums up cells that were timed apart; degrees of freedom by Welch and Satterthwaite."""
        before = [count * ms for count, ms in zip(counts, baselines_ms, strict=True)]
        after = [ms * math.exp(-r.log_ratio) for ms, r in zip(before, ratios, strict=True)]
        squares = [(ms * r.std_error) ** 2 for ms, r in zip(after, ratios, strict=True)]
        variance = sum(squares)
        lost = sum(v**2 / r.degrees for v, r in zip(squares, ratios, strict=True) if v)
        degrees = variance**2 / lost if lost else min(ratio.degrees for ratio in ratios)
        return cls(sum(before), sum(after), math.sqrt(variance), degrees)

    @property
    def saved_ms(self) -> float:
        """What the variant takes less."""
        return self.baseline_ms - self.variant_ms

    @property
    def saved_ci95(self) -> tuple[float, float]:
        """The ends of its 95 % interval."""
        low, high = self.speedup.ci95
        return self.baseline_ms * (1 - 1 / low), self.baseline_ms * (1 - 1 / high)

    @property
    def speedup(self) -> Speedup:
        """How many times faster the variant is, with a 95 % interval."""
        ratio = math.log(self.baseline_ms / self.variant_ms)
        return SpeedupEstimate(ratio, self.std_error_ms / self.variant_ms, self.degrees).speedup()


def of_rows(
    rows: Sequence[LatencyRow],
    counts: Sequence[float],
    arm: str = "candidate",
) -> RequestEstimate:
    """What saved rows say of an arm."""
    known = [row.baseline.median_ms for row in rows]
    return RequestEstimate.of(counts, known, [_ratio(row, arm) for row in rows])


def _ratio(row: LatencyRow, arm: str) -> SpeedupEstimate:
    estimate = estimate_between(row, second=arm)
    if row.rounds >= FEWEST_ROUNDS:
        return estimate
    # What is trimmed of so few may be all of their spread: two rounds would look certain.
    spread = float(ratios_between(row, second=arm).std(ddof=1))
    error = max(estimate.std_error, spread / math.sqrt(row.rounds))
    return SpeedupEstimate(estimate.log_ratio, error, min(max(estimate.degrees, 1), row.rounds - 1))


_WARM_UP_SECONDS = 10.0
_RELOADED_SECONDS = 20.0  # with less time loading anew would leave none for rounds
_FEWEST_PARTS = 6  # between loads: an interval of fewer says nothing


@dataclass(frozen=True)
class Effort:
    """How long a request is timed."""

    seconds: float = 60.0
    rounds: int | None = None
    reload: bool = True
    clock: Clock = time.perf_counter_ns
    seed: int = field(default_factory=lambda: secrets.randbits(32))


def time_request(
    arms: Mapping[str, TimedArm],
    cells: Sequence[tuple[Shape, float]],
    effort: Effort,
    known: Callable[[RequestEstimate], bool],
    progress: Progress = QUIET,
) -> list[LatencyRow]:
    """Times all cells of a request."""
    counts = [count for _, count in cells]

    def enough(rows: Sequence[MeasuredRow]) -> bool:
        if any(len(row.chunks) < _FEWEST_PARTS for row in rows):
            return False
        medians = [float(np.median(row.times()[0])) for row in rows]
        return known(RequestEstimate.of(counts, medians, [row.estimate() for row in rows]))

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
        clock=effort.clock,
        enough=None if effort.rounds is not None else enough,
        progress=progress,
    )
