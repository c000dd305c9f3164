"""PyTorch's threads where others work too: as many as there are idle cores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from exporter.processes import CpuTimes, cpu_times, other_cpu_share

_EVERY_S = 5.0
_FIRST_LOOK_S = 0.2


@dataclass
class IdleThreads:
    """Looks now and then at what other processes take of the machine."""

    clock: Callable[[], float] = time.monotonic  # in seconds
    sleep: Callable[[float], None] = time.sleep  # waits so many seconds
    times: Callable[[], CpuTimes | None] = cpu_times
    _most: int = 0
    _set: int = 0
    _looked: float = -math.inf
    _before: CpuTimes | None = None

    @property
    def most(self) -> int:
        """PyTorch's own number of threads, which it works with on a quiet machine."""
        import torch

        return self._most or torch.get_num_threads()

    def fit(self) -> None:
        """Sets PyTorch's threads to its own number, less the share that others take.

        It is asked for between a model's runs, and looks every few seconds. A number that someone
        else has set meanwhile is the most from then on.
        """
        if self.clock() - self._looked < _EVERY_S:
            return
        import torch

        if (current := torch.get_num_threads()) != self._set:
            self._most = self._set = current
        share = self._share_of_others() if self._most > 1 else None
        self._looked = self.clock()
        if share is not None:
            self._set = max(1, round(self._most * (1 - share)))
            torch.set_num_threads(self._set)

    def _share_of_others(self) -> float | None:
        if self._before is None:
            self._before = self.times()
            self.sleep(_FIRST_LOOK_S)
        before, self._before = self._before, self.times()
        return other_cpu_share(before, self._before)


IDLE_THREADS = IdleThreads()
"""This process's."""
