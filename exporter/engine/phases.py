"""How far a build is, from the builder's nested phases."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from types import ModuleType

_STEP = 0.01


class Phases:
    """Adds nested phases up to one fraction: a phase's part is one step of its parent.

    Args:
        told: Called with the fraction, 0 to 1, whenever it has grown by a hundredth.
    """

    def __init__(self, told: Callable[[float], None]) -> None:
        self._told = told
        self._last = 0.0
        # By name: where its part begins, how large it is, and into how many steps it falls.
        self._open: dict[str, tuple[float, float, int]] = {}
        self._lock = Lock()  # the builder calls from several threads

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self._lock:
            begin, size, parts = self._open.get(parent or "", (0.0, 1.0, 1))
            done = max(self._last, begin)
            self._open[name] = (done, size / max(parts, 1), max(steps, 1))

    def step(self, name: str, number: int) -> None:
        """A step of a phase, counted from 0, is done."""
        with self._lock:
            if name in self._open:
                begin, size, parts = self._open[name]
                self._reach(begin + size * min(number + 1, parts) / parts)

    def finish(self, name: str) -> None:
        """A phase ends."""
        with self._lock:
            begin, size, _ = self._open.pop(name, (0.0, 0.0, 1))
            self._reach(begin + size)

    def _reach(self, done: float) -> None:
        if min(done, 1.0) >= self._last + _STEP:
            self._last = min(done, 1.0)
            self._told(self._last)


def make_monitor(module: ModuleType, told: Callable[[float], None]) -> object:
    """A progress monitor of a library's own class."""
    phases = Phases(told)

    class Monitor(module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            phases.start(name, parent, steps)

        def step_complete(self, name: str, step: int) -> bool:
            phases.step(name, step)
            return True

        def phase_finish(self, name: str) -> None:
            phases.finish(name)

    return Monitor()
