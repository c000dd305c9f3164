"""A machine that exists only in numbers: calls move its clock, and others disturb them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import LatencyRow
from exporter.artifacts.latency import Shape
from exporter.compare.timing.measuring import TimingBudget, measure_rows
from exporter.compare.timing.subjects import CallProbe, Probe
from exporter.engines.runners.base import BoundCall

RECORDED = Path(__file__).parent / "benchmarks" / "decode_steps.npz"
HELD_OUT = RECORDED.with_name("decode_steps_held_out.npz")


class Noise(Protocol):
    """How much longer a call takes than on a machine of its own."""

    def factor(self, now_s: float) -> float:
        """For a call that begins now; about 1 when nothing disturbs it."""


class VirtualTime:
    """A clock that only calls move."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


@dataclass
class VirtualArm:
    """An arm of virtual calls."""

    time: VirtualTime
    call_ms: float
    noise: Noise
    lottery: float = 0.0
    rng: np.random.Generator = field(default_factory=np.random.default_rng)
    later: float = 0.0
    loads: list[VirtualArm] = field(default_factory=list)
    builds: ClassVar[int] = 1
    _luck: float = 1.0

    def load(self) -> None:
        """Draws where it comes to lie."""
        place = self.later if self.loads else 0.0
        self.loads.append(self)
        self._luck = float(np.exp(self.lottery * self.rng.standard_normal() - place))

    def unload(self) -> None:
        """Makes room."""
        self.loads.clear()

    def use_build(self, number: int) -> None:
        """There is one."""

    def probe(self, cell: Shape) -> Probe:
        """A call."""
        return CallProbe(BoundCall(self._call))

    def _call(self) -> None:
        factor = self.noise.factor(self.time.now_ns / 1e9)
        self.time.now_ns += max(1, round(self.call_ms * self._luck * factor * 1e6))


class Quiet:
    """No noise."""

    def factor(self, now_s: float) -> float:
        """One."""
        return 1.0


class BusyMachine:
    """Contention that comes and goes, calls that scatter, bursts, and a slow drift."""

    def __init__(self, seed: int, *, contention: float = 2.0, scatter: float = 0.07) -> None:
        self._rng = np.random.default_rng(seed)
        self._contention = contention
        self._scatter = scatter
        self._level = 1.0
        self._until_s = 0.0
        self._phase = float(self._rng.uniform(0, 2 * np.pi))

    def factor(self, now_s: float) -> float:
        """See :class:`Noise`."""
        rng = self._rng
        while now_s >= self._until_s:
            self._until_s += float(rng.exponential(1.5))
            share = rng.random()
            quiet = share < 0.12
            self._level = 1.0 if quiet else self._contention * float(np.exp(rng.normal(0, 0.15)))
        drift = 1 + 0.1 * float(np.sin(now_s / 20 + self._phase))
        burst = 1 + float(rng.exponential(0.5)) if rng.random() < 0.03 else 1.0
        scatter = float(np.exp(self._scatter * rng.standard_normal()))
        return self._level * drift * scatter * burst


class Replayed:
    """Recorded steps, from a place that is drawn, again and again.

    Without ``stretch`` there are no more courses than steps, and a long row meets the same ones
    again. With it, they are those of the stationary bootstrap (Politis and Romano, JASA 89, 1994).
    """

    def __init__(
        self, steps_ms: NDArray[np.float64], seed: int, *, stretch: float = math.inf
    ) -> None:
        self._factors = steps_ms / steps_ms.min()
        self._rng = np.random.default_rng(seed)
        self._jumps = 1 / stretch
        self._next = int(self._rng.integers(len(steps_ms)))

    def factor(self, now_s: float) -> float:
        """See :class:`Noise`."""
        self._next = (self._next + 1) % len(self._factors)
        if self._jumps and self._rng.random() < self._jumps:
            self._next = int(self._rng.integers(len(self._factors)))
        return float(self._factors[self._next])


VirtualCell = partial(Shape, phase="decode", batch=1, sequence_length=1, past_length=128)
"""A decode step of nothing."""


def virtual_pair(
    noise: Noise, *, slowdown: float = 1.0, call_ms: float = 29.0, seed: int = 0,
    lottery: float = 0.0, later: float = 0.0,
) -> tuple[VirtualTime, dict[str, VirtualArm]]:  # fmt: skip
    """A baseline and a candidate that takes ``slowdown`` times as long."""
    time, loads = VirtualTime(), list[VirtualArm]()
    rng = np.random.default_rng(seed)
    arms = {
        name: VirtualArm(time, call_ms * factor, noise, lottery, rng, later, loads)
        for name, factor in (("baseline", 1.0), ("candidate", slowdown))
    }
    for arm in arms.values():
        arm.load()
    return time, arms


def timed(
    budget: TimingBudget, noise: Noise | None = None, *, store: Any = None, **kind: Any
) -> LatencyRow:
    """The row of a virtual pair."""
    time, arms = virtual_pair(noise or Quiet(), **kind)
    (row,) = measure_rows(arms, [VirtualCell()], budget, clock=time, store=store)
    return row
