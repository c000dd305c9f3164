"""The clock, what reading it costs, and whether it may be believed."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Clock = Callable[[], int]
"""A monotonic clock in nanoseconds."""

_READINGS = 200
_SLACK_NS = 5_000_000  # two clocks are read one after the other, and not at the same moment
_SLACK = 0.01


def _since_boot() -> int:
    # Where there is no such clock, nothing tells that the machine slept.
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(frozen=True)
class Clocks:
    """The clock that times, and another that goes on where the first one may stand still.

    Attributes:
        now: Times the calls.
        witness: Counts the time that the machine sleeps, too.
    """

    now: Clock = time.perf_counter_ns
    witness: Clock = _since_boot


class Watch:
    """Says of a stretch of time whether both clocks saw it alike."""

    def __init__(self, clocks: Clocks) -> None:
        self._clocks = clocks
        self._begin = clocks.now(), clocks.witness()

    def agrees(self, timed_ms: float) -> bool:
        """Whether the clock ran forwards, as far as the witness, and what was timed fits in.

        Args:
            timed_ms: The sum of the times that were taken in this stretch.
        """
        passed = self._clocks.now() - self._begin[0]
        witnessed = self._clocks.witness() - self._begin[1]
        slack = _SLACK_NS + _SLACK * max(passed, witnessed)
        return passed >= 0 and abs(passed - witnessed) <= slack and timed_ms * 1e6 <= passed + slack


def timer_overhead_ns(clock: Clock) -> float:
    """What two readings add to a time; it isn't subtracted: a call takes thousands of times that.

    The median of many pairs of readings with nothing between them.
    """
    found = []
    for _ in range(_READINGS):
        begin = clock()
        found.append(clock() - begin)
    return float(statistics.median(found))


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collects now, and not again within the block."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def little_garbage() -> Iterator[None]:
    """Collects now, and lets later collections pass over what was there before the block.

    With PyTorch loaded each of them would take a good part of a second, and there is one a chunk.
    """
    gc.collect()
    if gc.get_freeze_count():  # somebody did it already, and will undo it
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
