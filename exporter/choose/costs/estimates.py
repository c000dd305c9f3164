"""From timed cells to a request: what it takes, what a cut saves of it, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from exporter.artifacts import FEWEST_ROUNDS, LatencyRow, Speedup
from exporter.compare.timing.statistics import SpeedupEstimate, estimate_between, ratios_between

if TYPE_CHECKING:
    from exporter.compare.timing.row import MeasuredRow


@dataclass(frozen=True)
class RequestPart:
    """One cell of a request.

    Attributes:
        count: How often it counts.
        baseline_ms: What it takes with the whole graph.
        ratio: The log of how many times faster the variant is.
    """

    count: float
    baseline_ms: float
    ratio: SpeedupEstimate

    @property
    def variant_ms(self) -> float:
        """What the cell takes of the request with the variant, as often as it counts."""
        return self.count * self.baseline_ms * math.exp(-self.ratio.log_ratio)


@dataclass(frozen=True)
class RequestEstimate:
    """Both arms' time of a request.

    The baseline's counts as known: what the two arms' rounds have in common, a busy machine for
    one, slows both, and it is the ratios that are measured.

    Attributes:
        baseline_ms: The whole graph's.
        variant_ms: The variant's.
        std_error_ms: Of the variant's.
        degrees: Of freedom of that.
    """

    baseline_ms: float
    variant_ms: float
    std_error_ms: float
    degrees: float

    @classmethod
    def of(cls, parts: Sequence[RequestPart]) -> RequestEstimate:
        """Sums up cells that were timed apart; degrees of freedom by Welch and Satterthwaite."""
        squares = [(part.variant_ms * part.ratio.std_error) ** 2 for part in parts]
        variance = sum(squares)
        lost = sum(v**2 / p.ratio.degrees for v, p in zip(squares, parts, strict=True) if v)
        return cls(
            baseline_ms=sum(part.count * part.baseline_ms for part in parts),
            variant_ms=sum(part.variant_ms for part in parts),
            std_error_ms=math.sqrt(variance),
            degrees=variance**2 / lost if lost else min(part.ratio.degrees for part in parts),
        )

    @property
    def saved_ms(self) -> float:
        """What the variant takes less."""
        return self.baseline_ms - self.variant_ms

    @property
    def speedup(self) -> Speedup:
        """How many times faster the variant is, with a 95 % interval."""
        ratio = math.log(self.baseline_ms / self.variant_ms)
        return SpeedupEstimate(ratio, self.std_error_ms / self.variant_ms, self.degrees).speedup()


def so_far(rows: Sequence[MeasuredRow], counts: Iterable[float]) -> RequestEstimate:
    """What rows say while they are measured.

    Args:
        rows: One of each cell, with two rounds at least.
        counts: How often each cell counts.
    """
    return RequestEstimate.of(
        [
            RequestPart(count, float(np.median(row.times()[0])), row.estimate())
            for row, count in zip(rows, counts, strict=True)
        ]
    )


def of_rows(
    rows: Sequence[LatencyRow],
    counts: Iterable[float],
    baselines_ms: Sequence[float] | None = None,
) -> RequestEstimate:
    """What saved rows say.

    Args:
        rows: One of each cell.
        counts: How often each cell counts.
        baselines_ms: What each cell takes with the whole graph; by default what these rows say.
    """
    known = baselines_ms or [row.baseline.median_ms for row in rows]
    return RequestEstimate.of(
        [
            RequestPart(count, baseline_ms, _ratio(row))
            for row, count, baseline_ms in zip(rows, counts, known, strict=True)
        ]
    )


def _ratio(row: LatencyRow) -> SpeedupEstimate:
    found = estimate_between(row)
    if row.rounds >= FEWEST_ROUNDS:
        return found
    # What is trimmed of so few may be all of their spread: two rounds would look certain.
    spread = float(ratios_between(row).std(ddof=1))
    error = max(found.std_error, spread / math.sqrt(row.rounds))
    return SpeedupEstimate(found.log_ratio, error, min(max(found.degrees, 1), row.rounds - 1))
