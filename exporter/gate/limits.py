"""How much worse a candidate may be, how such limits are written, and which figures they are on."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Annotated, Any, get_args

from pydantic import Field

from exporter.artifacts import Arm, Check, CheckVerdict, ComparisonReport, Quantity, Scale
from exporter.artifacts.accuracy import Agreement
from exporter.option_types import Amount, Share
from exporter.options import Options, dataclass, option
from exporter.report.words import short_shape

_Share = Annotated[Share, Field(ge=0, allow_inf_nan=False)]
_AtMostOne = Annotated[Share, Field(ge=0, le=1)]
_Factor = Annotated[Amount, Field(gt=0, allow_inf_nan=False)]
_Nats = Annotated[Amount, Field(ge=0, allow_inf_nan=False)]


def _limit(words: str, **look: Any) -> Any:
    return option(None, words, section="Limits", **look)


@dataclass(frozen=True)
class Limits(Options):
    """What is checked: each limit that isn't None."""

    max_slowdown: _Share | None = _limit("Limit for each shape's time, such as 3%.")
    min_speedup: _Factor | None = _limit(
        "Minimum speedup over the unpruned model, such as 1.1.", metavar="FACTOR"
    )
    max_perplexity_increase: _Share | None = _limit("Limit for the rise of the perplexity.")
    max_kl: _Nats | None = _limit(
        "Limit for the KL divergence from the unpruned model.", metavar="NATS"
    )
    min_top1_agreement: _AtMostOne | None = _limit(
        "Minimum share of positions at which both models have the same top-1 token."
    )
    min_embedding_cosine: _AtMostOne | None = _limit(
        "Encoders: minimum cosine with the unpruned model's embeddings."
    )
    min_rank_agreement: _AtMostOne | None = _limit(
        "Encoders: minimum correlation (Spearman) of the similarities of pairs of texts with those "
        "in the unpruned model.",
        config_only=True,
    )
    max_task_drop: _Share | None = _limit(
        "Limit for the drop of a task's score: 1% is 0.01.",
        brief="Limit for the drop of a task's score",
    )
    max_size_increase: _Share | None = _limit("Limit for the size of files and engines.")
    max_memory_increase: _Share | None = _limit("Limit for KV cache and device memory.")
    max_node_increase: _Share | None = _limit("Limit for the graph's nodes: 0%.", rare=True)
    noise_floor: _Share = option(
        0.01,
        "Smaller changes of time count as noise; so do those within the measured noise.",
        usual="1%",
        section="Baselines and verdicts",
        config_only=True,
    )

    @property
    def empty(self) -> bool:
        """Whether nothing is limited."""
        return self == Limits(noise_floor=self.noise_floor)


AGAINST_BASELINE = Limits(
    max_slowdown=0.03,
    max_perplexity_increase=0.01,
    max_size_increase=0.01,
    max_memory_increase=0.01,
)
"""What is checked against an earlier report where the caller names nothing."""

Figure = tuple[Quantity, str]
"""A quantity, and the shape, task or file that it is of."""

UNPRUNED = "against the unpruned arm"

LIMIT_ON: dict[Quantity, str] = {
    "time": "max_slowdown",
    "speedup": "min_speedup",
    "perplexity": "max_perplexity_increase",
    "kl_divergence": "max_kl",
    "top1_agreement": "min_top1_agreement",
    "embedding_cosine": "min_embedding_cosine",
    "rank_agreement": "min_rank_agreement",
    "task": "max_task_drop",
    "size": "max_size_increase",
    "memory": "max_memory_increase",
    "nodes": "max_node_increase",
}


def counts(arm: Arm) -> dict[Figure, int]:
    """Files, engines, memory and nodes of an arm, those that it has; of engines the largest."""
    numbers: dict[Figure, int | None] = {
        ("size", "files"): arm.file_bytes,
        ("size", "engines"): max((engine.engine_bytes for engine in arm.engines), default=None),
        ("memory", "KV cache per token"): arm.kv_cache_bytes_per_token,
        ("memory", "device memory"): arm.device_memory_bytes,
        ("nodes", "graph"): arm.nodes,
    }
    return {figure: count for figure, count in numbers.items() if count}


def figures(report: ComparisonReport, arm: Arm) -> list[Figure]:
    """All that a report tells of one of its arms and that a limit can be on."""
    shapes = [short_shape(row) for row in report.latency]
    timed: list[Quantity] = ["time", "speedup"]
    times = [(quantity, shape) for shape in shapes for quantity in timed]
    quality: list[Figure] = []
    if (accuracy := report.accuracy) is not None:
        if accuracy.perplexity is not None:
            quality.append(("perplexity", "evaluation text"))
        quality += [(figure.key, UNPRUNED) for figure in accuracy.agreement]
        quality += [("task", f"{one.task}, {one.metric}") for one in accuracy.tasks]
    return [*times, *quality, *counts(arm)]


Interval = tuple[float, float]

_STRICTER = 1.47
"""By how much wider than one of 95 % an interval is that equal arms leave 4 times in 1000."""
_OF_THE_CUT = ("speedup", *get_args(Agreement))
"""What is told of the candidate and its unpruned arm: a demand on it is met or not."""
_ROUNDING = 1e-9  # a size exactly at its limit is within it, whatever the logarithm's last digit


@dataclasses.dataclass(frozen=True)
class CheckedValue:
    """A value before it has a verdict; see :class:`exporter.artifacts.Check` for the units."""

    quantity: Quantity
    subject: str
    unit: str
    before: float | None
    after: float
    value: float
    ci95: Interval | None = None  # its interval; None for what is exact, such as a size
    scale: Scale = "ratio"
    higher_is_better: bool = False
    unchanged: float = 1.0
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
        limit=limit,
        noise_floor=found.noise_floor,
        verdict=verdict,
        reason=" ".join(part for part in (reason, found.note) if part),
    )


def _verdict(checked_value: CheckedValue, limit: float) -> tuple[CheckVerdict, str]:
    if any(map(math.isnan, (checked_value.value, *(checked_value.ci95 or ())))):
        return "inconclusive", "The value or its interval is not a number."
    low, high = sorted(
        _harm(checked_value, bound) for bound in checked_value.ci95 or (checked_value.value,) * 2
    )
    harm, most = _harm(checked_value, checked_value.value), _harm(checked_value, limit) + _ROUNDING
    floor = _floor(checked_value)
    if checked_value.doubt:
        return "inconclusive", checked_value.doubt + _more(checked_value)
    if low > most:
        # A demanded gain is missed by the distance from the demand.
        missed = harm - min(most, 0)
        if missed > floor and missed > _STRICTER * _reach(harm, low):
            return "regressed", "All of the interval is beyond the limit." * bool(
                checked_value.ci95
            )
        return "inconclusive", "Beyond the limit, but within what equal arms differ by here."
    if high > most:
        return "inconclusive", "The limit lies inside the interval." + _more(checked_value)
    better = -harm > max(floor, _ROUNDING) and -harm > _STRICTER * _reach(high, harm)
    return (
        "improved" if better and checked_value.quantity not in _OF_THE_CUT else "within_limit",
        "",
    )


def _more(checked_value: CheckedValue) -> str:
    """What narrows an interval; a comparison ends early where its own verdict is clear."""
    if checked_value.quantity in ("time", "speedup"):
        return " More rounds narrow it (compare --rounds)."
    return (
        " More text narrows it (compare --eval-tokens)." if checked_value.quantity != "task" else ""
    )


def _reach(high: float, low: float) -> float:
    return 0.0 if high == low else high - low  # infinite bounds of a collapsed model, too


def _harm(checked_value: CheckedValue, value: float) -> float:
    sign = -1 if checked_value.higher_is_better else 1
    if checked_value.scale == "difference":
        return sign * (value - checked_value.unchanged)
    return sign * (_log(value) - _log(checked_value.unchanged))


def _floor(checked_value: CheckedValue) -> float:
    return (
        math.log1p(checked_value.noise_floor)
        if checked_value.scale == "ratio"
        else checked_value.noise_floor
    )


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
