"""Which samples each step of a training reads."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from exporter.heal.options import HealOptions
from exporter.models.texts.calibration import CalibrationText


class Schedule:
    """The samples of a text, step by step, in another order whenever it is read again.

    Paragraphs, which are padded, are read beside others of about the same length, always the same
    ones: so there is little padding, and the whole model's answers to them can be kept.

    Args:
        text: The samples.
        options: How many tokens in a step and in all, and the seed.
        processes: That share a step.

    Attributes:
        step_tokens: Real tokens of a step, on average.
        total_steps: How many make up all tokens.
        reads_steps_again: Whether the samples of a step come together again.
    """

    def __init__(self, text: CalibrationText, options: HealOptions, processes: int = 1) -> None:
        lengths = text.mask.sum(axis=1)
        mean, self._count, self._seed = float(lengths.mean()), len(lengths), options.seed
        wanted = max(1, int(options.step_tokens // mean))
        self._per_step = min(wanted * processes, self._count)
        self.step_tokens = round(self._per_step * mean)
        self.total_steps = max(1, round(options.trained_tokens / self.step_tokens))
        self._groups = [] if text.mask.all() else _alike_long(lengths, self._per_step)
        epochs = self.total_steps * self._per_step / self._count
        fixed = self._per_step == 1 or bool(self._groups)
        self.reads_steps_again = epochs > 1 and fixed

    def rows(self, step: int) -> list[int]:
        """The numbers of the samples of a step."""
        if self._groups:
            epoch, place = divmod(step, len(self._groups))
            return self._groups[_shuffled(self._seed, epoch, len(self._groups))[place]]
        places = range(step * self._per_step, (step + 1) * self._per_step)
        return [int(self._order(place // self._count)[place % self._count]) for place in places]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The first is the text's own, a mixture of its sources throughout."""
        if epoch == 0:
            return np.arange(self._count)
        return _shuffled(self._seed, epoch, self._count)


def _alike_long(lengths: NDArray[np.int64], size: int) -> list[list[int]]:
    """Groups of so many samples, those of about the same length together."""
    order = np.argsort(lengths, kind="stable").tolist()
    return [order[start : start + size] for start in range(0, len(order), size)]


@cache
def _shuffled(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)
