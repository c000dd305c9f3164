"""When a row is measured no longer, without more false alarms for having looked often.

A row's time budget is cut into chunks, and after some of them the verdict is looked at. Each look
could be wrong, so the chance of a wrong word is spent over the looks (Lan and DeMets, "Discrete
sequential boundaries for clinical trials", Biometrika 1983): up to a share f of the budget f**8 of
it. By the union bound all looks together are wrong no more often than one look with the whole
chance, whatever the noise is like. Little is spent early: only a large difference ends a row soon.
"""

from __future__ import annotations

from exporter.compare.timing.statistics import ONE_LOOK, Chances

CHUNKS = 16
"""Parts of a row's budget; fewer where loading the arms takes long."""

FEWEST_LOADS = 6
"""An interval of fewer groups is so wide that it says nothing."""

_POWER = 8
_LOOKS = (6 / 16, 8 / 16, 11 / 16)


class Looks:
    """The looks at one row, and what each may spend.

    Args:
        chunks: Parts of the row's budget.
    """

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks
        self._places = {max(FEWEST_LOADS, round(chunks * share)) for share in _LOOKS}
        self._spent = 0.0

    def due(self, chunk: int) -> bool:
        """Whether there is a look after so many chunks, which isn't the last."""
        return chunk in self._places and chunk < self._chunks

    def spend(self, chunk: int) -> Chances:
        """What the look after so many chunks may spend."""
        return self._up_to(min(1.0, chunk / self._chunks) ** _POWER)

    def rest(self) -> Chances:
        """What is left for the last look."""
        return self._up_to(1.0)

    def _up_to(self, whole: float) -> Chances:
        share, self._spent = whole - self._spent, whole
        return Chances(equal=ONE_LOOK.equal * share, threshold=ONE_LOOK.threshold * share)
