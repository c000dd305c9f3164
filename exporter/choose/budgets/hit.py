"""Brings a plan's measured speedup to the target: cut, measure, correct, choose again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from exporter.artifacts import Speedup
from exporter.choose.budgets.walk import Walk
from exporter.errors import PlanError
from exporter.printable import counted
from exporter.progress import QUIET, Progress

TOLERANCE = 0.03
"""How far the measured speedup may be from the target, as a share of it."""
ROUNDS = 4
_MOST_CHANGE = 2.0
"""A single measurement changes the goal at most by this factor: it may have been disturbed."""


@dataclass(frozen=True, eq=False)
class Measured:
    """A walk whose candidate was cut and measured."""

    walk: Walk
    speedup: Speedup

    def miss(self, target: float) -> float:
        """How far from the target, as a share of it."""
        return abs(self.speedup.ratio / target - 1)

    def reaches(self, target: float) -> bool:
        """Whether it is as fast as was asked for, up to the tolerance."""
        return self.speedup.ratio >= target * (1 - TOLERANCE)

    def is_shown(self, target: float) -> bool:
        """Whether all of the interval, not only its middle, is near the target."""
        return all(abs(end / target - 1) <= TOLERANCE for end in self.speedup.ci95)


def hit(
    target: float,
    goal_ms: float,
    solve: Callable[[float], Walk],
    measure: Callable[[Walk], Speedup],
    *,
    rounds: int = ROUNDS,
    progress: Progress = QUIET,
) -> Measured:
    """Chooses, measures and corrects until the measured speedup is near the target.

    What costs foretell is wrong by some factor: a candidate shows by which, and the next goal is
    larger or smaller by it. The slowest candidate that reaches the target comes back; where none
    does, the nearest.

    Args:
        target: How many times as fast a request is to be.
        goal_ms: What has to go from a request's time, in the costs' milliseconds.
        solve: Chooses a walk that saves so many ms.
        measure: Cuts its candidate and measures it.
        rounds: At most so many candidates.
        progress: Told of each.

    Raises:
        PlanError: From ``solve``, or the corrected goal is out of reach; says what was measured.
    """
    tried: list[Measured] = []
    while True:
        try:
            walk = solve(goal_ms)
        except PlanError as error:
            if any(each.reaches(target) for each in tried):
                break
            _refuse_target(target, tried, error)
        if any(_same(walk, each.walk) for each in tried):
            break  # one sublayer more or less is all there is between
        tried.append(Measured(walk, measure(walk)))
        _tell(tried[-1], target, progress)
        if tried[-1].miss(target) <= TOLERANCE or len(tried) == rounds:
            break
        goal_ms *= _correction(target, tried[-1].speedup.ratio)
    return _best(tried, target)


def _best(tried: list[Measured], target: float) -> Measured:
    """The slowest that reaches the target: faster than that costs answers for nothing."""
    reaching = [each for each in tried if each.reaches(target)]
    if reaching:
        return min(reaching, key=lambda each: each.speedup.ratio)
    return min(tried, key=lambda each: each.miss(target))


def _refuse_target(target: float, tried: list[Measured], error: PlanError) -> NoReturn:
    """Refuses what only the measurement showed to be out of reach."""
    if not tried:
        raise error
    nearest = _best(tried, target).speedup.ratio
    raise PlanError(
        f"A speedup of {target:g} is out of reach: the nearest candidate measured {nearest:.3f} "
        f"times as fast, and no more can be dropped. {error}",
        f"Ask for at most {nearest:.3f}, allow more damage, or let more be dropped.",
    ) from error


def _correction(target: float, measured: float) -> float:
    """By what the goal was too small: time to save over time saved."""
    saved = 1 - 1 / measured
    wanted = 1 - 1 / target
    factor = wanted / saved if saved > 0 else math.inf
    return min(max(factor, 1 / _MOST_CHANGE), _MOST_CHANGE)


def _same(one: Walk, other: Walk) -> bool:
    return one.choices == other.choices


def _tell(found: Measured, target: float, progress: Progress) -> None:
    low, high = found.speedup.ci95
    progress.say(
        f"plan: a candidate without {counted(len(found.walk.choices), 'sublayer')} measures "
        f"{found.speedup.ratio:.3f} [{low:.3f}, {high:.3f}]; the target is {target:g}"
    )
