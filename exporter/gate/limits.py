"""How much worse a candidate may be, how such limits are written, and which figures they are on."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

from exporter.artifacts import Check, CheckVerdict
from exporter.artifacts.figures import LIMITED, Figure, NotNegative, options_of
from exporter.options import dataclass, option

_LIMITS = [figure.limit for figure in LIMITED.values() if figure.limit is not None]
_Limited: Any = options_of(_LIMITS, "Limits")


@dataclass(frozen=True)
class Limits(_Limited):  # type: ignore[misc]
    """What is checked: each limit that isn't None."""

    noise_floor: NotNegative = option(
        0.01,
        "Smaller changes of time count as noise; so do those within the measured noise.",
        usual="1%",
        section="Baselines and verdicts",
        config_only=True,
    )

    def on(self, quantity: str) -> float | None:
        """The limit on a figure; None without any."""
        limit: float | None = getattr(self, limit_on(quantity))
        return limit

    @property
    def empty(self) -> bool:
        """Whether nothing is limited."""
        return all(self.on(quantity) is None for quantity in LIMITED)


_USUAL: dict[str, Any] = {one.name: one.usual for one in _LIMITS}
AGAINST_BASELINE = Limits(**_USUAL)
"""What is checked against an earlier report where the caller names nothing."""

Interval = tuple[float, float]


def limit_on(quantity: str) -> str:
    """The option with the limit on a figure."""
    limit = LIMITED[quantity].limit
    assert limit is not None
    return limit.name


_STRICTER = 1.47
"""By how much wider than one of 95 % an interval is that equal arms leave 4 times in 1000."""
_ROUNDING = 1e-9  # a size exactly at its limit is within it, whatever the logarithm's last digit


@dataclasses.dataclass(frozen=True)
class CheckedValue:
    """A value before it has a verdict; see :class:`exporter.artifacts.Check` for the units."""

    quantity: str
    subject: str
    before: float | None
    after: float
    value: float
    ci95: Interval | None = None  # its interval; None for what is exact, such as a size
    higher_is_better: bool = False
    noise_floor: float = 0.0
    doubt: str = ""
    note: str = ""

    @property
    def figure(self) -> Figure:
        """What it is a value of."""
        return LIMITED[self.quantity]


def checked(item: CheckedValue, limit: float) -> Check:
    """Gives a value its verdict.

    ``regressed``: all of the interval is worse than the limit, and the change exceeds the noise
    floor. ``inconclusive``: the limit lies inside the interval, or a change beyond the limit is
    within the noise floor, or there is doubt about the interval. ``improved``: all of the
    interval is better than before, and the change exceeds the noise floor. ``within_limit``: the
    rest; a speedup, a divergence or an agreement has no before, and can't be improved.
    """
    verdict, reason = _verdict(item, limit)
    return Check(
        quantity=item.quantity,
        subject=item.subject,
        better="higher" if item.higher_is_better else "lower",
        before=item.before,
        after=item.after,
        value=item.value,
        ci95=item.ci95,
        limit=limit,
        noise_floor=item.noise_floor,
        verdict=verdict,
        reason=" ".join(part for part in (reason, item.note) if part),
    )


def _verdict(item: CheckedValue, limit: float) -> tuple[CheckVerdict, str]:
    if any(map(math.isnan, (item.value, *(item.ci95 or ())))):
        return "inconclusive", "The value or its interval is not a number."
    low, high = sorted(_harm(item, bound) for bound in item.ci95 or (item.value,) * 2)
    harm, most = _harm(item, item.value), _harm(item, limit) + _ROUNDING
    floor = _floor(item)
    if item.doubt:
        return "inconclusive", item.doubt + item.figure.narrowed_by
    if low > most:
        # A demanded gain is missed by the distance from the demand.
        missed = harm - min(most, 0)
        if missed > floor and missed > _STRICTER * _reach(harm, low):
            return "regressed", "All of the interval is beyond the limit." * bool(item.ci95)
        return "inconclusive", "Beyond the limit, but within what equal arms differ by here."
    if high > most:
        return (
            "inconclusive",
            "The limit lies inside the interval." + item.figure.narrowed_by,
        )
    better = -harm > max(floor, _ROUNDING) and -harm > _STRICTER * _reach(high, harm)
    return (
        "improved" if better and not item.figure.of_the_cut else "within_limit",
        "",
    )


def _reach(high: float, low: float) -> float:
    return 0.0 if high == low else high - low  # infinite bounds of a collapsed model, too


def _harm(item: CheckedValue, value: float) -> float:
    sign = -1 if item.higher_is_better else 1
    if item.figure.scale == "difference":
        return sign * (value - item.figure.unchanged)
    return sign * (_log(value) - _log(item.figure.unchanged))


def _floor(item: CheckedValue) -> float:
    return math.log1p(item.noise_floor) if item.figure.scale == "ratio" else item.noise_floor


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
