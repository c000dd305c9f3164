"""From an estimate to one word, without more false alarms for having looked often.

A row's time budget is cut into chunks, and after some of them the verdict is looked at. Each look
could be wrong, so the chance of a wrong word is spent over the looks (Lan and DeMets, "Discrete
sequential boundaries for clinical trials", Biometrika 1983): up to a share f of the budget f**8 of
it. By the union bound all looks together are wrong no more often than one look with the whole
chance, whatever the noise is like. Little is spent early: only a large difference ends a row soon.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from exporter.artifacts import FEWEST_ROUNDS, NoiseFloor, VerdictWord
from exporter.compare.timing.statistics import Milliseconds, SpeedupEstimate, estimate, log_ratios

THRESHOLD = 0.01
"""Below one percent a difference counts as none."""

CHUNKS = 16
"""Parts of a row's budget; fewer where loading the arms takes long."""

FEWEST_LOADS = 6
"""An interval of fewer groups is so wide that it says nothing."""

_POWER = 8
_LOOKS = (6 / 16, 8 / 16, 11 / 16)


@dataclass(frozen=True)
class ErrorBudget:
    """How often a word may be wrong.

    Attributes:
        equal: That equal arms are called ``faster`` or ``slower``, both sides together.
        threshold: That arms which differ by just the threshold are called anything, both sides
            together: each word is a claim about one side, and wrong there in half as many cases.
    """

    equal: float = 0.006
    threshold: float = 0.1


ONE_LOOK = ErrorBudget()


class SequentialTest:
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

    def spend(self, chunk: int) -> ErrorBudget:
        """What the look after so many chunks may spend."""
        return self._up_to(min(1.0, chunk / self._chunks) ** _POWER)

    def rest(self) -> ErrorBudget:
        """What is left for the last look."""
        return self._up_to(1.0)

    def _up_to(self, whole: float) -> ErrorBudget:
        share, self._spent = whole - self._spent, whole
        return ErrorBudget(equal=ONE_LOOK.equal * share, threshold=ONE_LOOK.threshold * share)


def noise_floor(baseline_ms: Milliseconds) -> NoiseFloor:
    """What the baseline against itself gives, from the same rounds as the comparison.

    Each round visits the baseline twice. Which visit plays which arm is drawn: an A/A run that
    costs no time and has met the same disturbances. The true ratio is 1, and the floor is how far
    from it such a ratio comes to lie in 95 of 100 sessions: half the width of its interval. It is
    taken closer by the square root of two, since each of the two arms has half as many samples here
    as an arm of the comparison.

    Args:
        baseline_ms: ``[rounds, 2 * calls]``; a round's first half are the times of its first visit.
    """
    half = baseline_ms.shape[1] // 2
    signs = np.random.default_rng(0).choice((-1.0, 1.0), len(baseline_ms))
    ratios = signs * log_ratios(baseline_ms[:, :half], baseline_ms[:, half:])[:, 0]
    speedup = estimate(ratios).speedup()
    low, high = map(math.log, speedup.ci95)
    reach = (high - low) / 2 / math.sqrt(2)
    return NoiseFloor(ratio=math.exp(min(reach, 700.0)), rounds=len(ratios), speedup=speedup)


def verdict(
    found: SpeedupEstimate,
    *,
    rounds: int,
    threshold: float = THRESHOLD,
    noise_floor: NoiseFloor | None = None,
    errors: ErrorBudget = ONE_LOOK,
) -> VerdictWord:
    """The verdict on an estimate: significance and size together.

    ``faster`` and ``slower`` need three things: the interval lies beyond the threshold
    (``errors.threshold``), a stricter one excludes equal arms (``errors.equal``), and the ratio
    is beyond the noise floor. ``same``: the interval lies within the threshold.
    """
    word = verdict_of_interval(found.interval(1 - errors.threshold), rounds, threshold)
    if word not in ("faster", "slower"):
        return word
    low, high = found.interval(1 - errors.equal)
    is_noise = noise_floor is not None and math.exp(abs(found.log_ratio)) <= noise_floor.ratio
    return "inconclusive" if is_noise or low <= 1 <= high else word


def verdict_of_interval(
    interval: tuple[float, float], rounds: int, threshold: float = THRESHOLD
) -> VerdictWord:
    """One word for where all of a speedup's interval lies.

    ``faster``: above ``1 + threshold``. ``slower``: below ``1 / (1 + threshold)``. ``same``:
    between the two. Otherwise ``inconclusive``: the measurement was too short or the machine too
    busy to tell. With fewer than ``FEWEST_ROUNDS`` rounds it is always ``inconclusive``.
    """
    low, high = interval
    if rounds < FEWEST_ROUNDS:
        return "inconclusive"
    if low > 1 + threshold:
        return "faster"
    if high < 1 / (1 + threshold):
        return "slower"
    return "same" if 1 / (1 + threshold) <= low and high <= 1 + threshold else "inconclusive"
