"""One cell of the grid while it is measured: its chunks, and what they say so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import LatencyRow, Stop, VerdictWord
from exporter.compare.timing.chunk import Chunk
from exporter.compare.timing.noise import noise_floor
from exporter.compare.timing.probe import Cell
from exporter.compare.timing.rounds import TURNS
from exporter.compare.timing.statistics import (
    ONE_LOOK,
    Estimate,
    Milliseconds,
    estimate,
    judge,
    log_ratios,
    paired_speedup,
    summarize,
)
from exporter.compare.timing.stopping import Looks

_OVER = 1.02  # of the budget a last chunk may take so much
_FEWEST = 2  # rounds that an interval needs, whatever the budget


@dataclass(frozen=True)
class Grouping:
    """How rounds hang together.

    Attributes:
        builds: Builds of each arm; chunk *i* timed build ``i % builds``.
        reloaded: Whether the arms were loaded anew for every chunk, in turns the other way round.
    """

    builds: int = 1
    reloaded: bool = False


class Row:
    """A cell's chunks.

    Args:
        cell: What is timed.
        arms: Names of all arms; the first is the baseline, the second the candidate.
        grouping: How rounds hang together.
        threshold: Below it a difference counts as none.
        chunks: In how many parts the budget is planned, or the rounds are taken; a multiple of the
            builds.
        seconds: The time budget; None where there is none.
        looks: Whether a clear verdict ends it before the time is up.
    """

    def __init__(
        self,
        cell: Cell,
        arms: Sequence[str],
        grouping: Grouping,
        *,
        threshold: float,
        chunks: int,
        seconds: float | None,
        looks: bool = True,
    ) -> None:
        self.cell = cell
        self.stopped: Stop | None = None
        self.chunks: list[Chunk] = []
        self._arms = arms
        self._grouping = grouping
        self._threshold = threshold
        self._most = chunks
        self._budget = seconds
        self._looks = Looks(chunks)
        self._is_looked_at = looks
        self._chances = ONE_LOOK

    @property
    def most(self) -> int:
        """How many chunks there are at the most."""
        return self._most if self._budget is None else 2 * self._most

    @property
    def seconds(self) -> float:
        """What its rounds have taken."""
        return sum(chunk.seconds for chunk in self.chunks)

    def add(self, chunk: Chunk) -> None:
        """Takes a chunk in, and looks whether that is enough."""
        self.chunks.append(chunk)
        count = len(self.chunks)
        if self._budget is None:
            self.stopped = "rounds" if count >= self._most else None
            return
        enough = sum(len(each.times_ms) for each in self.chunks) >= _FEWEST
        whole = enough and count % self._grouping.builds == 0
        another = self.seconds * (1 + 1 / count)
        # Chunks that turned out shorter than planned leave room for more of them.
        if whole and (count >= self.most or another > _OVER * self._budget):
            self._chances = self._looks.rest()
            self.stopped = "narrow" if self._told() else "budget"
        elif whole and self._is_looked_at and self._looks.due(count):
            self._chances = self._looks.spend(count)
            self.stopped = "narrow" if self._told() else None

    def end(self) -> None:
        """Ends it here, where someone else has found it narrow enough."""
        if self.stopped is None:
            self.stopped = "narrow"

    def _told(self) -> bool:
        return all(self._word(phase) != "inconclusive" for phase in range(len(self.cell.phases)))

    def _word(self, phase: int) -> VerdictWord:
        baseline_ms = self.times(phase)[0]
        return judge(
            self.estimate(phase),
            rounds=len(baseline_ms),
            threshold=self._threshold,
            noise_floor=noise_floor(baseline_ms),
            chances=self._chances,
        )

    def estimate(self, phase: int = 0) -> Estimate:
        """What its rounds say so far; there are two at least."""
        times = self.times(phase)
        return estimate(
            log_ratios(times[0], times[1], turns=TURNS),
            groups=self._groups,
            alternating=self._alternating,
        )

    @property
    def _groups(self) -> int:
        if self._grouping.builds > 1:
            return self._grouping.builds
        return len(self.chunks) if self._grouping.reloaded else 1

    @property
    def _alternating(self) -> bool:
        return self._grouping.reloaded and self._grouping.builds == 1

    def times(self, phase: int = 0) -> list[Milliseconds]:
        """By arm, ``[rounds, 2 * calls]``, the rounds of one build together."""
        builds = self._grouping.builds
        ordered = [chunk for build in range(builds) for chunk in self.chunks[build::builds]]
        joint: NDArray[np.float64] = np.concatenate([chunk.times_ms for chunk in ordered])
        return [joint[:, arm, :, phase] for arm in range(len(self._arms))]

    def records(self, timer_overhead_ns: float) -> list[LatencyRow]:
        """What the report says of it, a row for each phase."""
        return [self._record(phase, timer_overhead_ns) for phase in range(len(self.cell.phases))]

    def _record(self, phase: int, timer_overhead_ns: float) -> LatencyRow:
        cell, times, found = self.cell, self.times(phase), self.estimate(phase)
        return LatencyRow(
            phase=cell.phases[phase],
            batch=cell.batch,
            sequence_length=cell.sequence_length,
            past_length=cell.past_length,
            new_tokens=cell.new_tokens,
            rounds=len(times[0]),
            builds=self._grouping.builds,
            loads=len(self.chunks) if self._grouping.reloaded else 1,
            dropped_rounds=sum(chunk.dropped for chunk in self.chunks),
            baseline=summarize(times[0]),
            candidate=summarize(times[1]),
            references={
                name: summarize(own) for name, own in zip(self._arms[2:], times[2:], strict=True)
            },
            speedup=paired_speedup(
                times[0],
                times[1],
                seed=0,
                turns=TURNS,
                groups=self._groups,
                alternating=self._alternating,
            ),
            verdict=self._word(phase),
            verdict_interval=found.interval(1 - self._chances.threshold),
            threshold=self._threshold,
            noise_floor=noise_floor(times[0]),
            stopped=self.stopped,
            seconds=self.seconds,
            settled=self.chunks[0].settled,
            clock=self.chunks[0].clock,
            timer_overhead_ns=timer_overhead_ns,
        )
