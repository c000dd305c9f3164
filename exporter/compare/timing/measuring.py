"""Times models against each other: interleaved, warmed up, loaded anew, raw samples kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from exporter.artifacts import LatencyRow
from exporter.artifacts.latency import Shape
from exporter.artifacts.store import Store
from exporter.compare.timing.row import (
    Chunk,
    MeasuredRow,
    Rounds,
    Times,
    calls_of_round,
    find_chunk,
    joined,
    keep_chunk,
)
from exporter.compare.timing.statistics import CHUNKS, FEWEST_LOADS
from exporter.compare.timing.subjects import (
    Clock,
    Probe,
    TimedArm,
    Warmup,
    calls_per_visit,
    launches_of,
    little_garbage,
    no_garbage_collection,
    one_clock,
    warm_up,
)
from exporter.printable import counted
from exporter.progress import QUIET, Progress

_LOADING = 2.0  # loading may take so many times as long as measuring


@dataclass(frozen=True)
class TimingBudget:
    """How long one row is measured."""

    seconds: float = 60.0
    # it ends with the chunk in which they are up, or with the second round; None: no limit
    wall_seconds: float | None = None
    rounds: int | None = None  # None goes by the budget
    threshold: float = 0.01
    warmup_seconds: float = 10.0
    reload: bool = True
    seed: int = 0


def measure_rows(
    arms: Mapping[str, TimedArm],  # the first is the baseline, the second the candidate
    cells: Sequence[Shape],
    budget: TimingBudget,
    *,
    store: Store | None = None,
    paired: int = 2,
    together: bool = True,
    clock: Clock = time.perf_counter_ns,
    after_chunk: Callable[[], None] = lambda: None,
    enough: Callable[[Sequence[MeasuredRow]], bool] | None = None,
    progress: Progress = QUIET,
) -> list[LatencyRow]:
    """Measures all arms at all cells."""
    measurement = _Measurement(
        arms, budget, store or Store(None), paired, together, clock, enough, progress
    )
    what = cells[0] if len(cells) == 1 else counted(len(cells), "shape")
    with little_garbage(), progress.task(f"time {what}"):
        return measurement.measure(cells, after_chunk)


@dataclass(frozen=True)
class _Bound:
    """Arms that are bound to a cell and warm."""

    cell: Shape
    names: Sequence[str]
    probes: Sequence[Probe]
    clock: Literal["host", "device"]
    warm: Warmup


@dataclass
class _Measurement:
    arms: Mapping[str, TimedArm]
    budget: TimingBudget
    store: Store
    paired: int
    together: bool
    clock: Clock
    enough: Callable[[Sequence[MeasuredRow]], bool] | None
    progress: Progress

    def __post_init__(self) -> None:
        builds, rounds = max(arm.builds for arm in self.arms.values()), self.budget.rounds
        self._builds = builds if rounds is None else min(builds, rounds)
        self._chunks = _chunks(self.budget, self._builds)
        self._rng = np.random.default_rng(self.budget.seed)
        self._bound: _Bound | None = None

    def measure(self, cells: Sequence[Shape], after_chunk: Callable[[], None]) -> list[LatencyRow]:
        begin, most = time.monotonic(), self.budget.wall_seconds
        first = find_chunk(self.store, cells[0], 0)
        if first is None:
            reloading = self._reloading(cells)
        else:  # loading may take another time today, but all chunks of a row must be of one kind
            reloading = first.reloaded
            self._chunks = first.planned
        rows = [self._row(cell, reloading) for cell in cells]
        number = 0
        while open_rows := [row for row in rows if row.stopped is None]:
            self._take_chunk(open_rows, number, reloading=reloading)
            after_chunk()
            number += 1
            whole = number % self._builds == 0  # builds have equal parts of a row
            if whole and self.enough is not None and self.enough(rows):
                for row in rows:
                    row.end()
            late = most is not None and time.monotonic() - begin > most
            if whole and late and all(row.has_estimate for row in rows):
                for row in rows:
                    row.end("budget")
        return [record for row in rows for record in row.records()]

    def _row(self, cell: Shape, reloading: bool) -> MeasuredRow:
        budget = self.budget
        return MeasuredRow(
            cell,
            list(self.arms),
            builds=self._builds,
            reloaded=reloading,
            threshold=budget.threshold,
            planned=self._chunks,
            budget=budget.seconds if budget.rounds is None else None,
            is_looked_at=self.enough is None,
        )

    def _reloading(self, cells: Sequence[Shape]) -> bool:
        """Whether to load anew for every chunk: tried once; fewer chunks where it takes long."""
        budget = self.budget
        if not budget.reload or self._builds > 1 or self._chunks < FEWEST_LOADS:
            return False
        begin = time.monotonic()
        if self.together:
            self._reload(backwards=False)
        else:
            for arm in self.arms.values():
                arm.probe(cells[0])
        if budget.rounds is not None:
            return True
        taken = max(time.monotonic() - begin, 1e-3)
        self._chunks = min(self._chunks, int(_LOADING * budget.seconds * len(cells) / taken))
        if not self.together:
            self._chunks = max(self._chunks, FEWEST_LOADS)
        if self._chunks >= FEWEST_LOADS:
            return True
        self._chunks = CHUNKS
        self.progress.say(
            f"time: the arms are loaded once, since loading takes {taken:.0f} s: their place "
            "in memory may influence the result; with more time they are reloaded more often"
        )
        return False

    def _reload(self, *, backwards: bool) -> None:
        arms = list(self.arms.values())[: self.paired]
        for arm in arms:
            arm.unload()
        for arm in reversed(arms) if backwards else arms:
            arm.load()

    def _take_chunk(self, rows: list[MeasuredRow], number: int, *, reloading: bool) -> None:
        missing = []
        for row in rows:
            known = find_chunk(self.store, row.cell, number)
            if known is None:
                missing.append(row)
            else:
                row.add(known)
        if missing and reloading and number and self.together:
            self._reload(backwards=number % 2 == 1)
        for arm in self.arms.values() if missing else ():
            arm.use_build(number % self._builds)
        for place, row in enumerate(missing):
            backwards = (number * len(missing) + place) % 2 == 1
            chunk = self._chunk(row, number, reloading=reloading, backwards=backwards)
            keep_chunk(self.store, row.cell, number, chunk)
            row.add(chunk)

    def _chunk(self, row: MeasuredRow, number: int, *, reloading: bool, backwards: bool) -> Chunk:
        """All arms' rounds: in turns, or where they aren't loaded together one after the other."""
        names = list(self.arms)
        groups = [names] if self.together else [[name] for name in names]
        parts: dict[str, Chunk] = {}
        for group in reversed(groups) if backwards else groups:
            like = next(iter(parts.values()), row.chunks[0] if row.chunks else None)
            parts[group[0]] = self._part(row, number, group, like, reloading=reloading)
        return joined([parts[group[0]] for group in groups])

    def _part(
        self,
        row: MeasuredRow,
        number: int,
        names: Sequence[str],
        like: Chunk | None,
        *,
        reloading: bool,
    ) -> Chunk:
        """Rounds of arms that are loaded together, as many and as long as another part's."""
        bound = self._warm(row.cell, number, names, reloading=reloading)
        warm = bound.warm
        calls = calls_per_visit(warm.call_ms) if like is None else like.calls
        wanted = self._wanted(like, number, warm.call_ms, calls)
        label = f"{row.cell}, part {number + 1}" + ("" if self.together else f", {names[0]}")
        rounds = Rounds(bound.probes, calls, self._rng, self.clock)
        begin, taken = self.clock(), list[Times]()
        with (
            no_garbage_collection(),
            self.progress.task(label, total=wanted, unit="rounds of timing") as task,
        ):
            for _ in range(wanted):
                taken.append(rounds.take())
                task.advance()
        seconds = (self.clock() - begin) / 1e9
        return Chunk(
            np.array(taken),
            seconds,
            warm.stable,
            bound.clock,
            planned=self._chunks,
            reloaded=reloading,
            launches=launches_of(bound.probes),
        )

    def _warm(self, cell: Shape, number: int, names: Sequence[str], *, reloading: bool) -> _Bound:
        """Binds arms and warms them up; those that were not let go of since are still both."""
        kept, self._bound = self._bound, None
        if kept is not None and (kept.cell, kept.names) == (cell, names):
            self._bound = kept
            return kept
        del kept  # what it holds is given back before others are bound
        probes = [self.arms[name].probe(cell) for name in names]
        together = self.together or all(
            getattr(arm, "on_device", False) for arm in self.arms.values()
        )
        clock = one_clock(probes, device=together)
        bound = _Bound(cell, names, probes, clock, self._warm_up(probes, cell, number))
        stays = self.together and self._builds == 1 and not reloading
        self._bound = bound if stays else None
        return bound

    def _warm_up(self, probes: Sequence[Probe], cell: Shape, number: int) -> Warmup:
        # Later the model's files, the threads and the processor are warm, and binding ran it once.
        seconds = 0.0 if number else self.budget.warmup_seconds
        warmup = warm_up(probes, seconds=seconds, clock=self.clock)
        if not warmup.stable and not number:
            calls = counted(warmup.calls, "warm-up call")
            self.progress.say(f"{cell}: times had not settled after {calls}")
        return warmup

    def _wanted(self, like: Chunk | None, number: int, call_ms: float, calls: int) -> int:
        """Rounds in a chunk."""
        budget = self.budget
        if budget.rounds is not None:
            return rounds_of_chunks(budget.rounds, self._chunks, self._builds)[number]
        if like is not None:
            return len(like.times_ms)
        round_ms = call_ms * calls_of_round(len(self.arms), calls)
        return max(1, round(budget.seconds * 1000 / self._chunks / max(round_ms, 1e-3)))


def _chunks(budget: TimingBudget, builds: int) -> int:
    """Parts of a row's measurement: as many for each build, and of equal length where they can."""
    rounds = budget.rounds
    if rounds is None:
        return math.ceil(CHUNKS / builds) * builds
    if rounds < FEWEST_LOADS:
        return builds
    fitting = (n for n in range(CHUNKS, FEWEST_LOADS - 1, -1) if rounds % n == 0)
    return builds * min(math.ceil(next(fitting, CHUNKS) / builds), rounds // builds)


def rounds_of_chunks(rounds: int, chunks: int, builds: int) -> list[int]:
    """How many rounds each chunk takes, so that together they take exactly as many as asked for.

    Builds take turns; their rounds, and those of one build's chunks, differ by one at most.
    """
    by_build = [_split(part, chunks // builds) for part in _split(rounds, builds)]
    return [by_build[number % builds][number // builds] for number in range(chunks)]


def _split(whole: int, parts: int) -> list[int]:
    """Numbers that differ by one at most, the larger first."""
    return [whole // parts + (part < whole % parts) for part in range(parts)]
