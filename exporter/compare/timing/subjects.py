"""Arms of one or several builds, of which one is loaded at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

from exporter.compare.timing.probe import CallProbe, Cell, Probe
from exporter.engines.inputs import Shape, make_inputs, random_tokens
from exporter.engines.runners.base import Runner


class Loadable(Protocol):
    """A build: it holds its weights between ``__enter__`` and ``__exit__``."""

    def __enter__(self) -> Any:
        """Loads it."""

    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> None:
        """Frees it."""


_B = TypeVar("_B", bound=Loadable)


class Builds(Generic[_B]):
    """What every :class:`~exporter.compare.timing.probe.Subject` does with its builds.

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


class RunnerSubject(Builds[Runner]):
    """An arm whose runs are single runs of a graph.

    Args:
        builds: Runners of the same model; the caller enters the first, and leaves whichever is
            entered in the end.
        vocabulary: How many tokens the models know.
    """

    def __init__(self, builds: Sequence[Runner], vocabulary: int) -> None:
        super().__init__(builds)
        self._vocabulary = vocabulary

    def probe(self, cell: Cell) -> Probe:
        """Binds the same random tokens for every arm."""
        if not isinstance(cell, Shape):
            raise TypeError(f"{cell} is no run of a graph")
        runner = self.current
        tokens = random_tokens(cell, self._vocabulary)
        return CallProbe(runner.prepare(make_inputs(runner.inputs, cell, tokens)))
