"""The time that is left of an export, corrected by what its stages took."""

from __future__ import annotations

from collections.abc import Mapping

from exporter.progress import Progress

_TIMED = ("time the sublayers", "heal", "measure")
"""Parts that keep to a time, whatever the machine does."""
_WORTH_TELLING, _WORTH_TELLING_S = 0.3, 20.0
"""A stage's time that is off by this share of it, and by so many seconds, is told."""


class Pace:
    """What stages took beside what was expected of them.

    Args:
        left: Seconds of the parts of each stage that is to come; none where nothing was told.
    """

    def __init__(self, left: Mapping[str, Mapping[str, float]] | None = None) -> None:
        self._left = dict(left or {})
        self._expected = self._taken = 0.0

    def ended(self, stage: str, seconds: float | None, progress: Progress) -> None:
        """Tells the time that is left where a stage took another time than was told.

        Args:
            stage: Which.
            seconds: What it took; None where its results were there already.
            progress: Told.
        """
        expected = sum(self._left.pop(stage, {}).values())
        if not expected or seconds is None:
            return
        self._expected += expected
        self._taken += seconds
        off = abs(seconds - expected)
        if self._left and off > max(_WORTH_TELLING_S, _WORTH_TELLING * expected):
            progress.say(
                f"export: {stage} took {time_words(seconds)}, not {time_words(expected)}; about "
                f"{time_words(self.left_s)} are left"
            )

    @property
    def left_s(self) -> float:
        """What the other stages take, at the pace of those before where they keep to no time."""
        pace = self._taken / self._expected if self._expected else 1.0
        parts = [part for stage in self._left.values() for part in stage.items()]
        return sum(seconds * (1 if name in _TIMED else pace) for name, seconds in parts)


def time_words(seconds: float) -> str:
    """``40 s``, ``3 min``."""
    return f"{max(1, round(seconds))} s" if seconds < 100 else f"{round(seconds / 60)} min"
