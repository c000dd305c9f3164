"""Rounds: every arm has two turns in each, in an order that is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from exporter.compare.timing.clock import Clocks, Watch
from exporter.compare.timing.probe import Probe, Sample

TURNS = 2
"""Of each arm in a round."""

Times = NDArray[np.float64]
"""Milliseconds of one round, ``[arms, 2 * calls, phases]``."""


class Rounds:
    """Takes rounds of the same arms.

    The order of the arms is drawn for each round and its second half runs backwards (ABBA or BAAB
    for two), so that a steady drift hits all alike, and no regular disturbance can keep step with
    one arm. An arm whose call is shorter than a turn makes several, and the first of them isn't
    timed: it finds caches and threads as another arm left them.

    Args:
        probes: The arms, bound.
        calls: Timed calls in a turn.
        rng: Draws the orders.
        clocks: The clocks.
    """

    def __init__(
        self, probes: Sequence[Probe], calls: int, rng: np.random.Generator, clocks: Clocks
    ) -> None:
        self._probes = probes
        self._calls = calls
        self._rng = rng
        self._clocks = clocks

    def take(self) -> Times | None:
        """One round; None where a clock jumped or a time is none, so that it must not count."""
        order = [int(arm) for arm in self._rng.permutation(len(self._probes))]
        taken: list[list[Sample]] = [[] for _ in self._probes]
        watch = Watch(self._clocks)
        for arm in (*order, *reversed(order)):
            taken[arm].extend(self._visit(self._probes[arm]))
        times = np.array(taken, np.float64)
        # A call's longest part is all of it.
        sound = watch.agrees(float(times.max(axis=-1).sum())) and (times > 0).all()
        return times if sound and np.isfinite(times).all() else None

    def _visit(self, probe: Probe) -> list[Sample]:
        clock = self._clocks.now
        if self._calls > 1:
            probe.sample(clock)
        return [probe.sample(clock) for _ in range(self._calls)]


def calls_of_round(arms: int, calls: int) -> int:
    """Calls in all of one round, those that aren't timed included."""
    return 2 * arms * (calls + (calls > 1))
