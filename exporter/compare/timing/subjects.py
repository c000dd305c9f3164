"""What is timed: arms that can be loaded, and a call of each that says how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar

from exporter.artifacts import TimedPhase
from exporter.artifacts.latency import Shape
from exporter.artifacts.nouns import Parts
from exporter.compare.timing.clock import Clock
from exporter.engines.inputs import make_inputs, random_tokens
from exporter.engines.runners.base import BoundCall, Runner

Sample = tuple[float, ...]
"""Milliseconds of one call: one number for each phase that the cell is timed for."""


class TimedCell(Protocol):
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

    @property
    def counts(self) -> Parts:
        """What ``sequence_length`` counts."""


class Probe(Protocol):
    """One arm bound to one cell of the grid."""

    def sample(self, clock: Clock) -> Sample:
        """Runs once.

        Raises:
            BackendError: The run fails.
        """


class TimedArm(Protocol):
    """An arm of one or several builds; one of them is loaded when it is handed over."""

    @property
    def builds(self) -> int:
        """How many builds it has."""

    def load(self) -> None:
        """Loads it anew, after :meth:`unload`."""

    def unload(self) -> None:
        """Gives back what it holds."""

    def use_build(self, number: int) -> None:
        """Times this one of its builds from now on; an arm of fewer begins again."""

    def probe(self, cell: TimedCell) -> Probe:
        """Binds it to a cell.

        Raises:
            BackendError: A first run fails.
            ComparisonError: An input's meaning isn't known.
        """


class CallProbe:
    """A bound call, timed by the host's clock or, where it can tell, by the device's."""

    def __init__(self, call: BoundCall) -> None:
        self._run, self._timed = call.run, call.timed
        self.launches = call.launches

    @property
    def on_device(self) -> bool:
        """Whether the device's own clock is read."""
        return self._timed is not None

    def by_host(self) -> None:
        """Reads the host's clock from now on."""
        self._timed = None

    def sample(self, clock: Clock) -> Sample:
        """Runs; see :class:`Probe`."""
        if self._timed is not None:
            return (self._timed(),)
        run = self._run
        begin = clock()
        run()
        end = clock()
        return ((end - begin) / 1e6,)


def one_clock(probes: Sequence[Probe], *, device: bool = True) -> Literal["host", "device"]:
    """Has all arms of a row timed by one clock, and says which.

    The device's where all can tell it; a device's time leaves out what a host's has.

    Args:
        probes: The arms, or those that are loaded.
        device: Whether the others tell it, too.
    """
    calls = [probe for probe in probes if isinstance(probe, CallProbe)]
    if device and len(calls) == len(probes) and all(call.on_device for call in calls):
        return "device"
    for call in calls:
        call.by_host()
    return "host"


def launches_of(probes: Sequence[Probe]) -> tuple[str, ...]:
    """How each arm's last run got to the device; see :class:`BoundCall`."""
    calls = [probe for probe in probes if isinstance(probe, CallProbe)]
    found = tuple(call.launches() for call in calls)
    return found if any(found) else ()


class Loadable(Protocol):
    """A build: it holds its weights between ``__enter__`` and ``__exit__``."""

    def __enter__(self) -> Any: ...
    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> None: ...


_B = TypeVar("_B", bound=Loadable)


class Builds(Generic[_B]):
    """What every :class:`TimedArm` does with its builds.

    Args:
        builds: Of the same model. One is loaded at a time: each holds the weights.
    """

    def __init__(self, builds: Sequence[_B]) -> None:
        self._builds = builds
        self._number = 0

    @property
    def builds(self) -> int:
        """How many builds it has."""
        return len(self._builds)

    @property
    def every(self) -> Sequence[_B]:
        """All of them."""
        return self._builds

    @property
    def current(self) -> _B:
        """The build that is timed now."""
        return self._builds[self._number]

    def use_build(self, number: int) -> None:
        """Loads this one in the place of the one that is loaded."""
        number %= len(self._builds)
        if number != self._number:
            self.unload()
            self._number = number
            self.load()

    def load(self) -> None:
        """Loads the build that is timed now."""
        self.current.__enter__()

    def unload(self) -> None:
        """Frees it."""
        self.current.__exit__(None, None, None)


class RunnerArm(Builds[Runner]):
    """An arm whose runs are single runs of a graph.

    Args:
        builds: Runners of the same model; the caller enters the first, and leaves whichever is
            entered in the end.
        vocabulary: How many tokens the models know.
    """

    def __init__(self, builds: Sequence[Runner], vocabulary: int) -> None:
        super().__init__(builds)
        self._vocabulary = vocabulary

    @property
    def on_device(self) -> bool:
        """Whether its times are the device's."""
        return self.current.has_device_clock

    def probe(self, cell: TimedCell) -> Probe:
        """Binds the same random tokens for every arm."""
        if not isinstance(cell, Shape):
            raise TypeError(f"{cell} is no run of a graph")
        runner = self.current
        tokens = random_tokens(cell, self._vocabulary)
        inputs = make_inputs(runner.inputs, cell, tokens)
        return CallProbe(runner.prepare(inputs, phase=cell.phase))
