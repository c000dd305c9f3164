"""What is timed: arms that can be loaded, and a call of each that says how long it took."""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from exporter.artifacts.latency import Shape
from exporter.engines.runners.base import BoundCall, Runner
from exporter.engines.runners.tensorrt import IN_TURNS, OnEngines, fit_together
from exporter.progress import Progress

Clock = Callable[[], int]
"""A monotonic clock in nanoseconds."""


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


Sample = tuple[float, ...]
"""Milliseconds of one call: one number for each phase that the cell is timed for."""


class Probe(Protocol):
    """One arm bound to one cell of the grid."""

    def sample(self, clock: Clock) -> Sample:
        """Runs once."""


class TimedArm(Protocol):
    """An arm of one or several builds; one of them is loaded when it is handed over."""

    builds: int

    def load(self) -> None:
        """Loads it anew, after :meth:`unload`."""

    def unload(self) -> None:
        """Gives back what it holds."""

    def use_build(self, number: int) -> None:
        """Times this one of its builds from now on; an arm of fewer begins again."""

    def probe(self, cell: Shape) -> Probe:
        """Binds it to a cell."""


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
    launches = tuple(call.launches() for call in calls)
    return launches if any(launches) else ()


class Loadable(Protocol):
    """A build: it holds its weights between ``__enter__`` and ``__exit__``."""

    def __enter__(self) -> Any: ...
    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> None: ...


_B = TypeVar("_B", bound=Loadable)


class Builds(Generic[_B]):
    """What every :class:`TimedArm` does with its builds."""

    def __init__(self, builds: Sequence[_B], vocabulary: int) -> None:
        self.every, self.builds = builds, len(builds)
        self._vocabulary = vocabulary
        self._number = 0

    @property
    def current(self) -> _B:
        """The build that is timed now."""
        return self.every[self._number]

    def use_build(self, number: int) -> None:
        """Loads this one in the place of the one that is loaded."""
        number %= self.builds
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
    """An arm whose runs are single runs of a graph."""

    @property
    def on_device(self) -> bool:
        """Whether its times are the device's."""
        return self.current.has_device_clock

    def probe(self, cell: Shape) -> Probe:
        """Binds the same random tokens for every arm."""
        inputs = self.current.inputs_of(cell, self._vocabulary)
        return CallProbe(self.current.prepare(inputs, phase=cell.phase))


@contextlib.contextmanager
def loaded(builds: Sequence[Sequence[Loadable]], progress: Progress) -> Iterator[bool]:
    """Loads the first build of each arm, and leaves whichever are loaded by the block's end.

    Engines that don't fit together take turns; gives whether they fit.
    """
    every = [build for own in builds for build in own]
    engines = [build for build in every if isinstance(build, OnEngines)]

    def load() -> None:
        with contextlib.ExitStack() as entering:
            for first, *_ in builds:
                entering.enter_context(first)
            entering.pop_all()

    with contextlib.ExitStack() as stack:
        for build in every:
            stack.callback(build.__exit__, None, None, None)
        fit = fit_together(load, engines)
        if not fit:
            progress.say(IN_TURNS)
            load()
        yield fit


_AGREEMENT = 0.05  # windows that differ by less have settled
_AGREEING_WINDOWS = 3
_MOST_WINDOWS = 8  # whose mean is held against that of as many before
_VISIT_MS = 25.0
_MOST_CALLS = 16


@dataclass(frozen=True)
class Warmup:
    """How the warm-up ended."""

    calls: int
    call_ms: float
    stable: bool
    seconds: float


def warm_up(probes: Sequence[Probe], *, seconds: float, clock: Clock) -> Warmup:
    """Calls all arms in turn until the last three windows of each agree, or the time is up.

    They agree within 5 %, or where noise doesn't let them, the mean of the last three to eight with
    that of as many before.
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
        if stable or taken > seconds:
            call_ms = max(statistics.median(values[-_AGREEING_WINDOWS:]) for values in taken_ms)
            return Warmup(calls, call_ms, stable, taken)
        per_window = calls_per_visit(max(values[-1] for values in taken_ms))


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
