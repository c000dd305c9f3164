"""An arm whose runs are single runs of a graph."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.backends.base import Runner
from exporter.measure.inputs import Shape, make_inputs, random_tokens
from exporter.measure.timing.probe import CallProbe, Cell, Probe


class RunnerSubject:
    """See :class:`exporter.measure.timing.probe.Subject`.

    Args:
        builds: Runners of the same model, entered by the caller, who leaves them too.
        vocabulary: How many tokens the models know.
    """

    def __init__(self, builds: Sequence[Runner], vocabulary: int) -> None:
        self._runners = builds
        self._vocabulary = vocabulary
        self._build = 0

    @property
    def builds(self) -> int:
        """How many builds it has."""
        return len(self._runners)

    def use_build(self, number: int) -> None:
        """Times this one from now on."""
        self._build = number % len(self._runners)

    def load(self) -> None:
        """Enters the runners."""
        for runner in self._runners:
            runner.__enter__()

    def unload(self) -> None:
        """Leaves them."""
        for runner in self._runners:
            runner.__exit__(None, None, None)

    def probe(self, cell: Cell) -> Probe:
        """Binds the same random tokens for every arm."""
        if not isinstance(cell, Shape):
            raise TypeError(f"{cell} is no run of a graph")
        runner = self._runners[self._build]
        tokens = random_tokens(cell, self._vocabulary)
        return CallProbe(runner.prepare(make_inputs(runner.inputs, cell, tokens)))
