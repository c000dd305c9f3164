"""One cell of the grid while it is measured: its chunks, and what they say so far."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import LatencyRow, Stop, VerdictWord
from exporter.artifacts.latency import Shape
from exporter.artifacts.store import Store
from exporter.compare.timing.statistics import (
    ONE_LOOK,
    TURNS,
    Milliseconds,
    SequentialTest,
    SpeedupEstimate,
    estimate,
    log_ratios,
    noise_floor,
    summarize,
    verdict,
)
from exporter.compare.timing.subjects import Clock, Probe, Sample
from exporter.errors import ComparisonError

Times = NDArray[np.float64]
"""Milliseconds of one round, ``[arms, 2 * calls, phases]``."""


@dataclass(frozen=True)
class Rounds:
    """Takes rounds of the same arms.

    The order of the arms is drawn for each round and its second half runs backwards (ABBA or BAAB
    for two), so that a steady drift hits all alike, and no regular disturbance can keep step with
    one arm. An arm whose call is shorter than a turn makes several, and the first of them isn't
    timed: it finds caches and threads as another arm left them.
    """

    probes: Sequence[Probe]
    calls: int
    rng: np.random.Generator
    clock: Clock

    def take(self) -> Times:
        """One round."""
        order = [int(arm) for arm in self.rng.permutation(len(self.probes))]
        taken: list[list[Sample]] = [[] for _ in self.probes]
        for arm in (*order, *reversed(order)):
            taken[arm].extend(self._visit(self.probes[arm]))
        times = np.array(taken, np.float64)
        if not (np.isfinite(times) & (times > 0)).all():
            raise ComparisonError(
                "A run took no time by this machine's clock.", "Measure again.", code="no-times"
            )
        return times

    def _visit(self, probe: Probe) -> list[Sample]:
        clock = self.clock
        if self.calls > 1:
            probe.sample(clock)
        return [probe.sample(clock) for _ in range(self.calls)]


def calls_of_round(arms: int, calls: int) -> int:
    """Calls in all of one round, those that aren't timed included."""
    return TURNS * arms * (calls + (calls > 1))


@dataclass(frozen=True)
class Chunk:
    """Rounds that were taken in one go, between two loadings of the arms."""

    times_ms: NDArray[np.float64]  # `[rounds, arms, 2 * calls, phases]`
    seconds: float
    settled: bool
    clock: Literal["host", "device"]
    planned: int
    reloaded: bool
    launches: tuple[str, ...] = ()

    @property
    def calls(self) -> int:
        """Timed calls of one turn."""
        return int(self.times_ms.shape[2]) // TURNS

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "times_ms": self.times_ms.tolist()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Chunk:
        """From plain data."""
        try:
            times = np.array(data["times_ms"], np.float64)
            launches = tuple(map(str, data.get("launches", ())))
            chunk = cls(**{**data, "times_ms": times, "launches": launches})
        except (TypeError, KeyError) as error:
            raise ValueError("this is no chunk") from error
        if times.ndim != 4 or not times.size or not np.isfinite(times).all() or (times <= 0).any():
            raise ValueError("these are no times")
        if launches and len(launches) != times.shape[1]:
            raise ValueError("it isn't told which arm's launches these are")
        return chunk


def joined(parts: Sequence[Chunk]) -> Chunk:
    """Parts of a chunk that were taken arm by arm, as one: the arms in the parts' order."""
    first, *others = parts
    if not others:
        return first
    ways = [way for part in parts for way in part.launches or ("",) * part.times_ms.shape[1]]
    return replace(
        first,
        times_ms=np.concatenate([part.times_ms for part in parts], axis=1),
        seconds=sum(part.seconds for part in parts),
        settled=all(part.settled for part in parts),
        launches=tuple(ways) if any(ways) else (),
    )


def find_chunk(store: Store, cell: Shape, number: int) -> Chunk | None:
    """The chunk of a cell, where an earlier run has finished it."""
    kept = store.find(f"{cell} #{number}")
    with contextlib.suppress(ValueError):
        return None if kept is None else Chunk.from_json(kept)
    return None


def keep_chunk(store: Store, cell: Shape, number: int, chunk: Chunk) -> None:
    """Keeps a finished chunk for a later run."""
    store.keep(f"{cell} #{number}", chunk.to_json())


_OVER = 1.02  # of the budget a last chunk may take so much
_FEWEST = 2  # rounds that an interval needs, whatever the budget


@dataclass
class MeasuredRow:
    """A cell's chunks."""

    cell: Shape
    arms: Sequence[str]  # the first is the baseline, the second the candidate
    _: KW_ONLY
    builds: int  # builds of each arm; chunk *i* timed build `i % builds`
    reloaded: bool
    threshold: float
    planned: int  # chunks
    budget: float | None  # seconds; None where there is no limit
    is_looked_at: bool = True
    stopped: Stop | None = None
    chunks: list[Chunk] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._test, self._errors = SequentialTest(self.planned), ONE_LOOK

    @property
    def most(self) -> int:
        """How many chunks there are at the most."""
        return self.planned if self.budget is None else 2 * self.planned

    @property
    def seconds(self) -> float:
        """What its rounds have taken."""
        return sum(chunk.seconds for chunk in self.chunks)

    def add(self, chunk: Chunk) -> None:
        """Takes a chunk in, and looks whether that is enough."""
        self.chunks.append(chunk)
        count = len(self.chunks)
        if self.budget is None:
            self.stopped = "rounds" if count >= self.planned else None
            return
        whole = self.has_estimate and count % self.builds == 0
        another = self.seconds * (1 + 1 / count)
        # Chunks that turned out shorter than planned leave room for more of them.
        if whole and (count >= self.most or another > _OVER * self.budget):
            self._errors = self._test.rest()
            self.stopped = "narrow" if self._is_clear() else "budget"
        elif whole and self.is_looked_at and self._test.due(count):
            self._errors = self._test.spend(count)
            self.stopped = "narrow" if self._is_clear() else None

    def end(self, why: Stop = "narrow") -> None:
        """Ends it here, where someone else has found it narrow enough, or the time is up."""
        if self.stopped is None:
            self.stopped = why

    @property
    def has_estimate(self) -> bool:
        """Whether its rounds are enough for an interval."""
        return sum(len(chunk.times_ms) for chunk in self.chunks) >= _FEWEST

    def _is_clear(self) -> bool:
        return all(self._verdict(phase) != "inconclusive" for phase in range(len(self.cell.phases)))

    def _verdict(self, phase: int) -> VerdictWord:
        baseline_ms = self.times(phase)[0]
        return verdict(
            self.estimate(phase),
            rounds=len(baseline_ms),
            threshold=self.threshold,
            noise_floor=noise_floor(baseline_ms),
            errors=self._errors,
        )

    def estimate(self, phase: int = 0) -> SpeedupEstimate:
        """What its rounds say so far; there are two at least."""
        several = self.builds > 1
        return estimate(
            log_ratios(*self.times(phase)[:2], turns=TURNS),
            groups=self.builds if several else self._loads,
            alternating=self.reloaded and not several,
        )

    @property
    def _loads(self) -> int:
        return len(self.chunks) if self.reloaded else 1

    def times(self, phase: int = 0) -> list[Milliseconds]:
        """By arm, ``[rounds, 2 * calls]``, the rounds of one build together."""
        builds = self.builds
        ordered = [chunk for build in range(builds) for chunk in self.chunks[build::builds]]
        joint: NDArray[np.float64] = np.concatenate([chunk.times_ms for chunk in ordered])
        return [joint[:, arm, :, phase] for arm in range(len(self.arms))]

    def records(self) -> list[LatencyRow]:
        """What the report says of it, a row for each phase."""
        return [self._record(phase) for phase in range(len(self.cell.phases))]

    def _launches(self) -> dict[str, str]:
        """By arm; where its chunks differ, each way once."""
        ways = zip(*(chunk.launches for chunk in self.chunks if chunk.launches), strict=True)
        joined = [" or ".join(sorted(set(way))) for way in ways]
        return dict(zip(self.arms, joined, strict=bool(joined)))

    def _record(self, phase: int) -> LatencyRow:
        cell, times = self.cell, self.times(phase)
        summaries = dict(zip(self.arms[2:], map(summarize, times[2:]), strict=True))
        return LatencyRow(
            phase=cell.phases[phase],
            batch=cell.batch,
            sequence_length=cell.sequence_length,
            past_length=cell.past_length,
            new_tokens=cell.new_tokens,
            counts=cell.counts,
            rounds=len(times[0]),
            builds=self.builds,
            loads=self._loads,
            baseline=summarize(times[0]),
            candidate=summarize(times[1]),
            references=summaries,
            speedup=self.estimate(phase).speedup(),
            verdict=self._verdict(phase),
            verdict_interval=self.estimate(phase).interval(1 - self._errors.threshold),
            threshold=self.threshold,
            noise_floor=noise_floor(times[0]),
            stopped=self.stopped,
            seconds=self.seconds,
            settled=self.chunks[0].settled,
            clock=self.chunks[0].clock,
            launches=self._launches(),
        )
