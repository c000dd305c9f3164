"""Intervals of what is made from two estimates of two sessions.

Zou and Donner, "Construction of confidence limits about effect measures" (Statistics in Medicine
27, 2008; MOVER): the limits of a difference of two independent estimates come from their own
limits, which need not be symmetric. On logarithms it serves ratios.
"""

from __future__ import annotations

import math

Interval = tuple[float, float]


def difference(
    first: float, first_ci95: Interval, second: float, second_ci95: Interval
) -> Interval:
    """The 95 % interval of ``first - second`` of two independent estimates."""
    middle = first - second
    down = math.hypot(first - first_ci95[0], second_ci95[1] - second)
    up = math.hypot(first_ci95[1] - first, second - second_ci95[0])
    return middle - down, middle + up


def ratio(first: float, first_ci95: Interval, second: float, second_ci95: Interval) -> Interval:
    """The same of ``first / second``; all values are above 0."""
    log = math.log
    low, high = difference(
        log(first),
        (log(first_ci95[0]), log(first_ci95[1])),
        log(second),
        (log(second_ci95[0]), log(second_ci95[1])),
    )
    return math.exp(low), math.exp(high)


def joined_floor(first: float, second: float) -> float:
    """The noise floor of a ratio of two estimates, from theirs, as shares above 1."""
    return math.expm1(math.hypot(math.log1p(first), math.log1p(second)))
