"""From a value, its interval and a limit to one word.

All is turned into *harm* first: how much worse than no change, in logarithms where the value is a
factor. A regression must be sure and large: the whole interval lies beyond the limit, a stricter
one excludes that nothing has changed, and the value exceeds what equal arms differ by on this
machine.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from exporter.artifacts import Check, CheckVerdict, Quantity, Scale

Interval = tuple[float, float]

_STRICTER = 1.47
"""By how much wider than one of 95 % an interval is that equal arms leave 4 times in 1000."""
_OF_THE_CUT: tuple[Quantity, ...] = (
    "speedup", "kl_divergence", "top1_agreement", "embedding_cosine",
    "rank_agreement",
)  # fmt: skip
"""What is told of the candidate and its unpruned arm: a demand on it is met or not."""
_ROUNDING = 1e-9  # a size exactly at its limit is within it, whatever the logarithm's last digit


@dataclass(frozen=True)
class CheckedValue:
    """A value before it has a verdict; see :class:`exporter.artifacts.Check` for the units.

    Attributes:
        ci95: Its interval; None for what is exact, such as a size.
        unchanged: The value that means no change: 1 for a factor, often 0 for an amount.
        reported_ci95: The interval that the report tells, where ``ci95`` is wider.
        doubt: Why nothing can be concluded from it; empty where something can.
        note: What a reader should know of how it was got.
    """

    quantity: Quantity
    subject: str
    unit: str
    before: float | None
    after: float
    value: float
    ci95: Interval | None = None
    scale: Scale = "ratio"
    higher_is_better: bool = False
    unchanged: float = 1.0
    reported_ci95: Interval | None = None
    noise_floor: float = 0.0
    doubt: str = ""
    note: str = ""


def checked(found: CheckedValue, limit: float) -> Check:
    """Gives a value its verdict.

    ``regressed``: all of the interval is worse than the limit, and the change exceeds the noise
    floor. ``inconclusive``: the limit lies inside the interval, or a change beyond the limit is
    within the noise floor, or there is doubt about the interval. ``improved``: all of the
    interval is better than before, and the change exceeds the noise floor. ``within_limit``: the
    rest; a speedup, a divergence or an agreement has no before, and can't be improved.

    Args:
        found: The value.
        limit: On the value's scale: 1.03 for at most 3 % more time.
    """
    verdict, reason = _verdict(found, limit)
    return Check(
        quantity=found.quantity,
        subject=found.subject,
        scale=found.scale,
        better="higher" if found.higher_is_better else "lower",
        unit=found.unit,
        before=found.before,
        after=found.after,
        value=found.value,
        ci95=found.ci95,
        reported_ci95=found.reported_ci95,
        limit=limit,
        noise_floor=found.noise_floor,
        verdict=verdict,
        reason=" ".join(part for part in (reason, found.note) if part),
    )


def _verdict(found: CheckedValue, limit: float) -> tuple[CheckVerdict, str]:
    if any(map(math.isnan, (found.value, *(found.ci95 or ())))):
        return "inconclusive", "The value or its interval is not a number."
    low, high = sorted(_harm(found, bound) for bound in found.ci95 or (found.value,) * 2)
    harm, most = _harm(found, found.value), _harm(found, limit) + _ROUNDING
    floor = _floor(found)
    if found.doubt:
        return "inconclusive", found.doubt + _more(found)
    if low > most:
        # A demanded gain is missed by the distance from the demand.
        missed = harm - min(most, 0)
        if missed > floor and missed > _STRICTER * _reach(harm, low):
            return "regressed", "All of the interval is beyond the limit." * bool(found.ci95)
        return "inconclusive", "Beyond the limit, but within what equal arms differ by here."
    if high > most:
        return "inconclusive", "The limit lies inside the interval." + _more(found)
    better = -harm > max(floor, _ROUNDING) and -harm > _STRICTER * _reach(high, harm)
    return "improved" if better and found.quantity not in _OF_THE_CUT else "within_limit", ""


def _more(found: CheckedValue) -> str:
    """What narrows an interval; a comparison ends early where its own verdict is clear."""
    if found.quantity in ("time", "speedup"):
        return " More rounds narrow it (compare --rounds)."
    if found.quantity == "probe":
        return " More items narrow it (compare --probes)."
    return " More text narrows it (compare --eval-tokens)." if found.quantity != "task" else ""


def _reach(high: float, low: float) -> float:
    return 0.0 if high == low else high - low  # infinite bounds of a collapsed model, too


def _harm(found: CheckedValue, value: float) -> float:
    sign = -1 if found.higher_is_better else 1
    if found.scale == "difference":
        return sign * (value - found.unchanged)
    return sign * (_log(value) - _log(found.unchanged))


def _floor(found: CheckedValue) -> float:
    return math.log1p(found.noise_floor) if found.scale == "ratio" else found.noise_floor


def _log(value: float) -> float:
    """What over- or underflowed counts as the last number: distances from it stay finite."""
    return math.log(min(max(value, sys.float_info.min), sys.float_info.max))


def overall(verdicts: list[CheckVerdict]) -> CheckVerdict:
    """One word for many: the worst, where a regression is worse than not knowing."""
    for word in ("regressed", "inconclusive", "improved"):
        if word in verdicts:
            return word
    return "within_limit"


def difference_interval(
    first: float, first_ci95: Interval, second: float, second_ci95: Interval
) -> Interval:
    """The 95 % interval of ``first - second`` of two sessions' independent estimates.

    Zou and Donner, "Construction of confidence limits about effect measures" (Statistics in
    Medicine 27, 2008; MOVER): it comes from the limits of both, which need not be symmetric.
    """
    middle = first - second
    down = math.hypot(first - first_ci95[0], second_ci95[1] - second)
    up = math.hypot(first_ci95[1] - first, second - second_ci95[0])
    return middle - down, middle + up


def ratio_interval(
    first: float, first_ci95: Interval, second: float, second_ci95: Interval
) -> Interval:
    """The same of ``first / second``; all values are above 0."""
    log = math.log
    low, high = difference_interval(
        log(first),
        (log(first_ci95[0]), log(first_ci95[1])),
        log(second),
        (log(second_ci95[0]), log(second_ci95[1])),
    )
    return math.exp(low), math.exp(high)


def joined_floor(first: float, second: float) -> float:
    """The noise floor of a ratio of two estimates, from theirs, as shares above 1."""
    return math.expm1(math.hypot(math.log1p(first), math.log1p(second)))
