"""Rounds, in each of which every arm has two turns, and chunks of them between two loadings."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.store import Store
from exporter.compare.timing.clock import Clocks, Watch
from exporter.compare.timing.statistics import TURNS
from exporter.compare.timing.subjects import Probe, Sample, TimedCell

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
    return TURNS * arms * (calls + (calls > 1))


@dataclass(frozen=True)
class Chunk:
    """Rounds that were taken in one go, between two loadings of the arms.

    Attributes:
        times_ms: ``[rounds, arms, 2 * calls, phases]``.
        seconds: What taking them took.
        settled: Whether the warm-up before them had settled.
        clock: Whose.
        planned: In how many chunks the row was to be measured.
        reloaded: Whether each of them has a loading of its own.
        dropped: Rounds that were thrown away.
        launches: How each arm's runs got to the device; empty where there is one way.
    """

    times_ms: NDArray[np.float64]
    seconds: float
    settled: bool
    clock: Literal["host", "device"]
    planned: int
    reloaded: bool
    dropped: int = 0
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
        """From plain data.

        Raises:
            ValueError: It isn't what :meth:`to_json` gives.
        """
        try:
            times = np.array(data["times_ms"], np.float64)
            launches = tuple(map(str, data.get("launches", ())))
            found = cls(**{**data, "times_ms": times, "launches": launches})
        except (TypeError, KeyError) as error:
            raise ValueError("this is no chunk") from error
        if times.ndim != 4 or not times.size or not np.isfinite(times).all() or (times <= 0).any():
            raise ValueError("these are no times")
        if launches and len(launches) != times.shape[1]:
            raise ValueError("it isn't told which arm's launches these are")
        return found


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
        dropped=sum(part.dropped for part in parts),
        launches=tuple(ways) if any(ways) else (),
    )


def find_chunk(store: Store, cell: TimedCell, number: int) -> Chunk | None:
    """The chunk of a cell, where an earlier run has finished it."""
    kept = store.find(f"{cell} #{number}")
    with contextlib.suppress(ValueError):
        return None if kept is None else Chunk.from_json(kept)
    return None


def keep_chunk(store: Store, cell: TimedCell, number: int, chunk: Chunk) -> None:
    """Keeps a finished chunk for a later run."""
    store.keep(f"{cell} #{number}", chunk.to_json())
