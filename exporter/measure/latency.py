"""Times two models against each other: interleaved, warmed up, raw samples kept.

Both arms live in one process and take turns in rounds, baseline - candidate - candidate -
baseline, and the other way round in every second one, so that a slow drift of the machine hits
both alike. Garbage collection is off while the clock runs.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from exporter.artifacts import LatencyRow
from exporter.backends.base import BoundCall, Runner
from exporter.measure.inputs import Shape, make_inputs, random_tokens
from exporter.measure.statistics import Milliseconds, paired_speedup, summarize, verdict
from exporter.progress import QUIET, Progress

Clock = Callable[[], int]
"""A monotonic clock in nanoseconds."""

_AGREEMENT = 0.05  # warm-up windows that differ by less have settled
_AGREEING_WINDOWS = 3


@dataclass(frozen=True)
class Sampling:
    """How long one row is measured.

    Attributes:
        rounds: Rounds at least; an interval needs two, a verdict six.
        most_rounds: Rounds at most, where calls are short.
        row_seconds: Rounds beyond ``rounds`` are added until the row has taken this long.
        visit_ms: How long an arm keeps its turn at least. An arm whose one call is shorter makes
            several, and the first of them isn't timed: it finds caches and threads as the other
            arm left them.
        most_calls: Calls of one turn at most.
        warmup_seconds: The warm-up ends here even when times have not settled.
    """

    rounds: int = 6
    most_rounds: int = 60
    row_seconds: float = 20.0
    visit_ms: float = 25.0
    most_calls: int = 16
    warmup_seconds: float = 10.0


@dataclass(frozen=True)
class Warmup:
    """How the warm-up ended.

    Attributes:
        calls: Calls of each arm.
        call_ms: The slower arm's median time of its last windows.
        stable: Whether times had settled.
    """

    calls: int
    call_ms: float
    stable: bool


def measure_row(
    baseline: Runner,
    candidate: Runner,
    shape: Shape,
    vocabulary: int,
    sampling: Sampling,
    *,
    progress: Progress = QUIET,
) -> LatencyRow:
    """Measures both arms at one shape, on the same random tokens.

    Raises:
        BackendError: When a run fails.
        ComparisonError: When an input's meaning isn't known.
    """
    tokens = random_tokens(shape, vocabulary)
    first, second = (
        runner.prepare(make_inputs(runner.inputs, shape, tokens))
        for runner in (baseline, candidate)
    )
    warmup = warm_up(first, second, sampling)
    if not warmup.stable:
        progress.say(f"{shape}: times had not settled after {warmup.calls} warm-up calls")
    baseline_ms, candidate_ms = sample_pair(
        first, second, sampling, call_ms=warmup.call_ms, progress=progress, label=f"time {shape}"
    )
    return _row(shape, baseline_ms, candidate_ms, settled=warmup.stable)


def warm_up(
    baseline: BoundCall,
    candidate: BoundCall,
    sampling: Sampling,
    *,
    clock: Clock = time.perf_counter_ns,
) -> Warmup:
    """Calls both arms in turn until the last three windows of each agree within 5 %."""
    arms = (baseline, candidate)
    windows: tuple[list[float], list[float]] = ([], [])
    deadline = clock() + round(sampling.warmup_seconds * 1e9)
    calls, per_window = 0, 1
    while True:
        for call, medians in zip(arms, windows, strict=True):
            medians.append(statistics.median(_timed(call, clock) for _ in range(per_window)))
        calls += per_window
        stable = all(map(_settled, windows))
        if stable or (len(windows[0]) >= _AGREEING_WINDOWS and clock() > deadline):
            call_ms = max(statistics.median(found[-_AGREEING_WINDOWS:]) for found in windows)
            return Warmup(calls, call_ms, stable)
        per_window = _calls_per_visit(max(found[-1] for found in windows), sampling)


def sample_pair(
    baseline: BoundCall,
    candidate: BoundCall,
    sampling: Sampling,
    *,
    call_ms: float,
    clock: Clock = time.perf_counter_ns,
    progress: Progress = QUIET,
    label: str = "",
) -> tuple[Milliseconds, Milliseconds]:
    """Times both arms in rounds.

    Args:
        baseline: One bound run of the baseline.
        candidate: One bound run of the candidate.
        sampling: How long to measure.
        call_ms: About how long a call takes; it decides the number of calls and rounds.
        clock: The clock.
        progress: Hears of each round.
        label: What is measured, in words.

    Returns:
        Times of the baseline and of the candidate, each ``[rounds, 2 * calls]``, in milliseconds.
    """
    calls = _calls_per_visit(call_ms, sampling)
    rounds = _rounds(call_ms * 4 * (calls + _lead_in(calls)), sampling)
    arms = (baseline, candidate)
    taken: tuple[list[list[float]], list[list[float]]] = ([], [])
    with progress.task(label, total=rounds) as task, _no_garbage_collection():
        for number in range(rounds):
            times: tuple[list[float], list[float]] = ([], [])
            for arm in (0, 1, 1, 0) if number % 2 == 0 else (1, 0, 0, 1):
                times[arm].extend(_visit(arms[arm], calls, clock))
            for rows, row in zip(taken, times, strict=True):
                rows.append(row)
            task.advance()
    return np.array(taken[0]), np.array(taken[1])


def _row(
    shape: Shape, baseline_ms: Milliseconds, candidate_ms: Milliseconds, *, settled: bool
) -> LatencyRow:
    speedup = paired_speedup(baseline_ms, candidate_ms, seed=0)
    return LatencyRow(
        phase=shape.phase,
        batch=shape.batch,
        sequence_length=shape.sequence_length,
        past_length=shape.past_length,
        rounds=len(baseline_ms),
        baseline=summarize(baseline_ms),
        candidate=summarize(candidate_ms),
        speedup=speedup,
        verdict=verdict(speedup, rounds=len(baseline_ms)),
        settled=settled,
    )


def _visit(call: BoundCall, calls: int, clock: Clock) -> list[float]:
    for _ in range(_lead_in(calls)):
        call()
    return [_timed(call, clock) for _ in range(calls)]


def _timed(call: BoundCall, clock: Clock) -> float:
    begin = clock()
    call()
    return (clock() - begin) / 1e6


def _settled(medians_ms: list[float]) -> bool:
    last = medians_ms[-_AGREEING_WINDOWS:]
    return len(last) == _AGREEING_WINDOWS and max(last) <= (1 + _AGREEMENT) * min(last)


def _calls_per_visit(call_ms: float, sampling: Sampling) -> int:
    return max(1, min(sampling.most_calls, round(sampling.visit_ms / max(call_ms, 1e-3))))


def _lead_in(calls: int) -> int:
    return 1 if calls > 1 else 0


def _rounds(round_ms: float, sampling: Sampling) -> int:
    wanted = int(sampling.row_seconds * 1000 / max(round_ms, 1e-3))
    return max(sampling.rounds, min(sampling.most_rounds, wanted))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
