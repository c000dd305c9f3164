"""What is timed: arms that can be loaded, and a call of each that says how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from exporter.artifacts import TimedPhase
from exporter.compare.timing.clock import Clock
from exporter.engines.runners.base import BoundCall

Sample = tuple[float, ...]
"""Milliseconds of one call: one number for each phase that the cell is timed for."""


class Probe(Protocol):
    """One arm bound to one cell of the grid."""

    def sample(self, clock: Clock) -> Sample:
        """Runs once.

        Raises:
            BackendError: The run fails.
        """


class Cell(Protocol):
    """One cell of the grid, and the rows that it gives."""

    @property
    def phases(self) -> tuple[TimedPhase, ...]:
        """A row each, in the order of a sample's numbers."""

    @property
    def batch(self) -> int:
        """Sequences."""

    @property
    def sequence_length(self) -> int:
        """New tokens of a run, or the prompt's."""

    @property
    def past_length(self) -> int:
        """Tokens in the cache before."""

    @property
    def new_tokens(self) -> int:
        """Tokens that are generated."""


class Subject(Protocol):
    """An arm: loaded when it is handed over."""

    def load(self) -> None:
        """Loads it anew, after :meth:`unload`."""

    def unload(self) -> None:
        """Gives back what it holds."""

    def use_build(self, number: int) -> None:
        """Times this one of its builds from now on; an arm of fewer begins again."""

    @property
    def builds(self) -> int:
        """How many builds it has."""

    def probe(self, cell: Cell) -> Probe:
        """Binds it to a cell.

        Raises:
            BackendError: A first run fails.
            ComparisonError: An input's meaning isn't known.
        """


class CallProbe:
    """A bound call, timed by the host's clock or, where it can tell, by the device's."""

    def __init__(self, call: BoundCall) -> None:
        self._run, self._device_ms = call.run, call.device_ms

    @property
    def on_device(self) -> bool:
        """Whether the device's own clock is read."""
        return self._device_ms is not None

    def sample(self, clock: Clock) -> Sample:
        """Runs once; see :class:`Probe`."""
        run = self._run
        begin = clock()
        run()
        end = clock()
        if self._device_ms is not None:
            return (self._device_ms(),)
        return ((end - begin) / 1e6,)


def clock_of(probes: Sequence[Probe]) -> Literal["host", "device"]:
    """``device`` where all arms are timed by the device, else ``host``."""
    return "device" if all(getattr(probe, "on_device", False) for probe in probes) else "host"
