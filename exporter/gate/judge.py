"""From an estimate, its interval and a limit to one word.

All is turned into *harm* first: how much worse than no change, in logarithms where the value is a
factor. A regression must be sure and large: the whole interval lies beyond the limit, a stricter
one excludes that nothing has changed, and the estimate exceeds what equal arms differ by on this
machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from exporter.artifacts import Check, CheckVerdict, Quantity, Scale

_STRICTER = 1.47
"""By how much wider than one of 95 % an interval is that equal arms leave 4 times in 1000."""
_ROUNDING = 1e-9  # a size exactly at its limit is within it, whatever the logarithm's last digit


@dataclass(frozen=True)
class Estimate:
    """A value before it is judged; see :class:`exporter.artifacts.Check` for the units.

    Attributes:
        unchanged: The value that means no change: 1 for a factor, often 0 for an amount.
        sure: False where the interval isn't one of 95 %, whatever it says.
        note: What a reader should know of how it was got.
    """

    quantity: Quantity
    subject: str
    unit: str
    before: float | None
    after: float
    value: float
    ci95: tuple[float, float] | None = None
    scale: Scale = "ratio"
    higher_is_better: bool = False
    unchanged: float = 1.0
    noise_floor: float = 0.0
    sure: bool = True
    note: str = ""


def judge(estimate: Estimate, limit: float) -> Check:
    """Gives an estimate its verdict.

    ``regressed``: all of the interval is worse than the limit, and the change exceeds the noise
    floor. ``inconclusive``: the limit lies inside the interval, or a change beyond the limit is
    within the noise floor, or the interval rests on too few rounds. ``improved``: all of the
    interval is better than no change, and the change exceeds the noise floor. ``unchanged``: the
    rest, which is within the limit.

    Args:
        estimate: The value.
        limit: On the estimate's scale: 1.03 for at most 3 % more time.
    """
    verdict, reason = _verdict(estimate, limit)
    return Check(
        quantity=estimate.quantity,
        subject=estimate.subject,
        scale=estimate.scale,
        better="higher" if estimate.higher_is_better else "lower",
        unit=estimate.unit,
        before=estimate.before,
        after=estimate.after,
        value=estimate.value,
        ci95=estimate.ci95,
        limit=limit,
        noise_floor=estimate.noise_floor,
        verdict=verdict,
        reason=" ".join(part for part in (reason, estimate.note) if part),
    )


def _verdict(estimate: Estimate, limit: float) -> tuple[CheckVerdict, str]:
    if any(map(math.isnan, (estimate.value, *(estimate.ci95 or ())))):
        return "inconclusive", "The value or its interval is not a number."
    low, high = sorted(_harm(estimate, bound) for bound in estimate.ci95 or (estimate.value,) * 2)
    harm, most = _harm(estimate, estimate.value), _harm(estimate, limit) + _ROUNDING
    floor = _floor(estimate)
    if not estimate.sure:
        return "inconclusive", "Too few rounds for a verdict." + _more(estimate)
    if low > most:
        # A demanded gain is missed by the distance from the demand.
        missed = harm - min(most, 0)
        if missed > floor and missed > _STRICTER * _reach(harm, low):
            return "regressed", "All of the interval is beyond the limit." * bool(estimate.ci95)
        return "inconclusive", "Beyond the limit, but within what equal arms differ by here."
    if high > most:
        return "inconclusive", "The limit lies inside the interval." + _more(estimate)
    if -harm > max(floor, _ROUNDING) and -harm > _STRICTER * _reach(high, harm):
        return "improved", ""
    return "unchanged", ""


def _more(estimate: Estimate) -> str:
    """What narrows an interval of time; a comparison ends early where its own verdict is clear."""
    timed = estimate.quantity in ("time", "speedup")
    return " More rounds narrow it (compare --rounds)." if timed else ""


def _reach(high: float, low: float) -> float:
    return 0.0 if high == low else high - low  # infinite bounds of a collapsed model, too


def _harm(estimate: Estimate, value: float) -> float:
    sign = -1 if estimate.higher_is_better else 1
    if estimate.scale == "difference":
        return sign * (value - estimate.unchanged)
    return sign * (_log(value) - _log(estimate.unchanged))


def _floor(estimate: Estimate) -> float:
    return math.log1p(estimate.noise_floor) if estimate.scale == "ratio" else estimate.noise_floor


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def overall(verdicts: list[CheckVerdict]) -> CheckVerdict:
    """One word for many: the worst, where a regression is worse than not knowing."""
    for word in ("regressed", "inconclusive", "improved"):
        if word in verdicts:
            return word
    return "unchanged"
