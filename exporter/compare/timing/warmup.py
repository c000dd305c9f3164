"""Calls all arms in turn until their times have settled."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from exporter.compare.timing.clock import Clock
from exporter.compare.timing.subjects import Probe

_AGREEMENT = 0.05  # windows that differ by less have settled
_AGREEING_WINDOWS = 3
_FEWEST_WINDOWS = 2  # where the time is up before
_MOST_WINDOWS = 8  # whose mean is held against that of as many before
_VISIT_MS = 25.0
_MOST_CALLS = 16


@dataclass(frozen=True)
class Warmup:
    """How the warm-up ended.

    Attributes:
        calls: Calls of each arm.
        call_ms: What a call of the slowest arm takes of the host's time, the median of its last
            windows; a call may run more than what it times.
        stable: Whether times had settled.
        seconds: What it took.
    """

    calls: int
    call_ms: float
    stable: bool
    seconds: float


def warm_up(
    probes: Sequence[Probe], *, seconds: float, clock: Clock, fewest: int = _FEWEST_WINDOWS
) -> Warmup:
    """Calls all arms in turn until the last three windows of each agree within 5 %.

    Or, where noise doesn't let them, until the mean of the last three to eight agrees so with that
    of as many before.

    Args:
        probes: The arms.
        seconds: It ends here, even when times have not settled.
        clock: The clock.
        fewest: Windows that there are in any case.
    """
    windows: list[list[float]] = [[] for _ in probes]
    taken_ms: list[list[float]] = [[] for _ in probes]
    begin = clock()
    calls, per_window = 0, 1
    while True:
        for probe, medians, passed_ms in zip(probes, windows, taken_ms, strict=True):
            began = clock()
            medians.append(_window(probe, per_window, clock))
            passed_ms.append((clock() - began) / 1e6 / per_window)
        calls += per_window
        taken = (clock() - begin) / 1e9
        stable = all(map(_settled, windows))
        if stable or (len(windows[0]) >= fewest and taken > seconds):
            call_ms = max(statistics.median(found[-_AGREEING_WINDOWS:]) for found in taken_ms)
            return Warmup(calls, call_ms, stable, taken)
        per_window = calls_per_visit(max(found[-1] for found in taken_ms))


def calls_per_visit(call_ms: float) -> int:
    """How many calls an arm makes in its turn, so that the turn takes about 25 ms at least."""
    return max(1, min(_MOST_CALLS, round(_VISIT_MS / max(call_ms, 1e-3))))


def _window(probe: Probe, calls: int, clock: Clock) -> float:
    """The median over the window's calls of the call's longest part."""
    return statistics.median(max(probe.sample(clock)) for _ in range(calls))


def _settled(medians_ms: list[float]) -> bool:
    """Whether windows agree or, on a machine where they never do, no longer fall or rise."""
    last = medians_ms[-_AGREEING_WINDOWS:]
    if len(last) < _AGREEING_WINDOWS:
        return False
    if _agree(max(last), min(last)):
        return True
    half = min(len(medians_ms) // 2, _MOST_WINDOWS)
    if half < _AGREEING_WINDOWS:
        return False
    return _agree(
        statistics.mean(medians_ms[-half:]), statistics.mean(medians_ms[-2 * half : -half])
    )


def _agree(one_ms: float, other_ms: float) -> bool:
    return max(one_ms, other_ms) <= (1 + _AGREEMENT) * min(one_ms, other_ms)
