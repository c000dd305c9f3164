"""What the raw times say, and how sure it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from exporter.artifacts import FEWEST_ROUNDS, LatencyRow, LatencySamples, Speedup, VerdictWord
from exporter.models.ablation.damage import ratio_std_error

Milliseconds = NDArray[np.float64]

TURNS = 2
"""Of each arm in a round."""

_TRIM = 0.25
_MANY_GROUPS = 8  # fewer can't tell whether they differ
_EXPLAINED = 1.2  # times the variance that rounds explain: groups that differ by less are alike
_CONFIDENCE = 0.95
_FURTHEST = 27.0
"""Of a logarithm of a ratio: that of a report ends before it."""


def summarize(samples_ms: Milliseconds) -> LatencySamples:
    """Percentiles of one arm's times.

    samples_ms: `[rounds, calls]`, in the order in which they were taken.
    """
    flat = np.asarray(samples_ms, dtype=np.float64).ravel()
    median, p95, p99 = np.percentile(flat, [50, 95, 99])
    return LatencySamples(
        median_ms=float(median),
        p95_ms=float(p95),
        p99_ms=float(p99),
        samples_ms=[float(value) for value in flat],
    )


def as_rounds(samples: LatencySamples, rounds: int) -> Milliseconds:
    """A saved arm's times as they were taken, ``[rounds, calls]``."""
    times = np.asarray(samples.samples_ms, dtype=np.float64)
    if rounds < 1 or not times.size or times.size % rounds:
        raise ValueError(f"{times.size} samples are not {rounds} equal rounds")
    return times.reshape(rounds, -1)


def log_ratios(
    baseline_ms: Milliseconds, candidate_ms: Milliseconds, *, turns: int = 1
) -> NDArray[np.float64]:
    """By turn, the log of the median of the baseline over that of the candidate.

    ``[rounds, turns]``; above 0 where the candidate was faster.

    baseline_ms: `[rounds, calls]`, the calls of the first turn first.
    candidate_ms: `[rounds, calls]`; row *i* was taken in the same round as the baseline's.
    """
    if baseline_ms.ndim != 2 or candidate_ms.ndim != 2 or len(baseline_ms) != len(candidate_ms):
        raise ValueError(f"shapes {baseline_ms.shape} and {candidate_ms.shape} are no pair")
    medians = []
    for times in (baseline_ms, candidate_ms):
        if (wrong := times[~(np.isfinite(times) & (times > 0))]).size:
            raise ValueError(f"times must be positive and finite, not {wrong[0]} ms")
        if times.shape[1] % turns:
            raise ValueError(f"{times.shape[1]} calls are not {turns} equal turns")
        medians.append(np.median(times.reshape(len(times), turns, -1), axis=2))
    array: NDArray[np.float64] = np.log(medians[0] / medians[1])
    return array


@dataclass(frozen=True)
class SpeedupEstimate:
    """A log speedup and how sure it is."""

    log_ratio: float
    std_error: float
    degrees: float

    def interval(self, confidence: float = _CONFIDENCE) -> tuple[float, float]:
        """The t interval of the speedup."""
        if self.std_error == 0:
            return math.exp(self.log_ratio), math.exp(self.log_ratio)
        reach = float(stats.t.ppf((1 + confidence) / 2, self.degrees)) * self.std_error
        low, high = self.log_ratio - reach, self.log_ratio + reach
        return math.exp(max(low, -_FURTHEST)), math.exp(min(high, _FURTHEST))

    @property
    def ratio(self) -> float:
        """The speedup: above 1 the candidate is faster."""
        return math.exp(self.log_ratio)

    def speedup(self) -> Speedup:
        """The ratio with its 95 % t interval."""
        return Speedup(ratio=self.ratio, ci95=self.interval())


def estimate(
    ratios: NDArray[np.float64], *, groups: int = 1, alternating: bool = False
) -> SpeedupEstimate:
    """The log speedup of rounds.

    ratios: `[rounds, turns]`, see log_ratios; at least two rounds.
    """
    if len(ratios) < 2:
        raise ValueError(f"an interval needs at least 2 rounds, not {len(ratios)}")
    grouped, strata = _grouped(ratios, groups), _strata(groups, alternating=alternating)
    # The strata's mean: their order is no part of the spread.
    centre = float(np.mean([_midmean(grouped[n::strata].ravel()) for n in range(strata)]))
    parts = [_winsorised(grouped[n::strata]) for n in range(strata)]
    result = _mean_of(list(map(_within, parts)))
    if groups > 1:
        result = _pooled(_mean_of(list(map(_between, parts))), result, groups)
    error, degrees = math.sqrt(result.variance), result.degrees
    if (rounds := len(ratios)) < FEWEST_ROUNDS:
        # What is trimmed of so few may be all of their spread: two rounds would look certain.
        error = max(error, float(ratios.std(ddof=1)) / math.sqrt(rounds))
        degrees = min(max(degrees, 1), rounds - 1)
    # Zero for times that agree to the last bits of a double.
    return SpeedupEstimate(centre, 0.0 if error < 1e-13 else error, degrees)


@dataclass(frozen=True)
class Spread:
    """The variance of a log speedup, and its degrees of freedom."""

    variance: float
    degrees: float


def _grouped(ratios: NDArray[np.float64], groups: int) -> NDArray[np.float64]:
    """``[groups, rounds, turns]``; NaN where a group has a round less than the first ones."""
    if not 1 <= groups <= len(ratios):
        raise ValueError(f"{len(ratios)} rounds are not {groups} groups")
    by_round = ratios.reshape(len(ratios), -1)
    array = np.full((groups, -(-len(ratios) // groups), by_round.shape[1]), np.nan)
    for group, part in zip(array, np.array_split(by_round, groups), strict=True):
        group[: len(part)] = part
    return array


def _strata(groups: int, *, alternating: bool) -> int:
    return 2 if alternating and groups >= 4 else 1


def _pooled(between: Spread, within: Spread, groups: int) -> Spread:
    """How groups differ; together with what rounds explain, if that is all."""
    many = groups >= _MANY_GROUPS and within.degrees >= FEWEST_ROUNDS
    if not many or between.variance > _EXPLAINED * within.variance:
        return between
    degrees = between.degrees + within.degrees
    squares = between.variance * between.degrees + within.variance * within.degrees
    return Spread(squares / degrees, degrees)


def _mean_of(spreads: list[Spread]) -> Spread:
    """Of the mean of independent, equally certain parts."""
    variance = sum(spread.variance for spread in spreads) / len(spreads) ** 2
    return Spread(variance, sum(spread.degrees for spread in spreads))


def _between(values: NDArray[np.float64]) -> Spread:
    """Of the mean of ``[groups, rounds, turns]``, by how groups differ."""
    sums = np.nansum(values.mean(axis=2), axis=1)
    error = ratio_std_error(sums, _rounds_of(values))
    assert error is not None  # there are two groups at least
    return Spread(error**2, len(values) - 1)


def _within(values: NDArray[np.float64]) -> Spread:
    """Of the mean of ``[groups, rounds, turns]``, by how rounds differ within their groups."""
    means, rounds = values.mean(axis=2), _rounds_of(values)
    total, kept = rounds.sum(), (rounds - 2 * _cut(rounds)).sum()
    if kept <= len(values):
        return Spread(0.0, 0)
    few = (1 - 1 / total) / (1 - 1 / kept)  # in Tukey's and McLaughlin's formula; else nearly one
    squares = np.nansum((means - np.nanmean(means, axis=1, keepdims=True)) ** 2)
    variance = float(squares) / (total - len(values)) / total * few
    return Spread(variance, kept - len(values))


def _rounds_of(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many rounds each group of ``[groups, rounds, turns]`` has."""
    counts: NDArray[np.float64] = np.isfinite(values[:, :, 0]).sum(axis=1).astype(np.float64)
    return counts


def _winsorised(ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values whose mean has about the variance of all values' midmean."""
    ordered = np.sort(ratios[np.isfinite(ratios)])
    count, cut = len(ordered), int(_cut(len(ordered)))
    clipped: NDArray[np.float64] = np.clip(ratios, ordered[cut], ordered[count - 1 - cut])
    return clipped * (count / (count - 2 * cut))


def _cut(count: Any) -> Any:
    """How many of the lowest, and of the highest, are left out."""
    return np.floor(_TRIM * count).astype(np.int64)


def _midmean(ratios: NDArray[np.float64]) -> Any:
    """Over the last axis, without NaN."""
    ordered = np.sort(ratios, axis=-1)  # NaN comes last
    counts = np.isfinite(ordered).sum(axis=-1, keepdims=True)
    cut, place = _cut(counts), np.arange(ratios.shape[-1])
    return ordered.mean(axis=-1, where=(place >= cut) & (place < counts - cut))


def times_of(row: LatencyRow) -> dict[str, LatencySamples]:
    """All arms' times of a recorded row, by name."""
    return {"baseline": row.baseline, "candidate": row.candidate, **row.references}


def estimate_between(
    row: LatencyRow, first: str = "baseline", second: str = "candidate"
) -> SpeedupEstimate:
    """How much faster one arm of a recorded row is than another."""
    several = row.builds > 1
    return estimate(
        ratios_between(row, first, second),
        groups=row.builds if several else row.loads,
        alternating=row.loads > 1 and not several,
    )


def ratios_between(
    row: LatencyRow, first: str = "baseline", second: str = "candidate"
) -> NDArray[np.float64]:
    """The log ratios of a recorded row's turns, see :func:`log_ratios`."""
    times = times_of(row)
    return log_ratios(*(as_rounds(times[n], row.rounds) for n in (first, second)), turns=TURNS)


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
    """How often a word may be wrong."""

    equal: float = 0.006
    threshold: float = 0.1


ONE_LOOK = ErrorBudget()


class SequentialTest:
    """The looks at one row, and what each may spend."""

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


def noise_floor(baseline_ms: Milliseconds) -> float:
    """What the baseline against itself gives, from the same rounds as the comparison.

    Each round visits the baseline twice. Which visit plays which arm is drawn: an A/A run that
    costs no time and has met the same disturbances. The true ratio is 1, and the floor is how far
    from it such a ratio comes to lie in 95 of 100 sessions: half the width of its interval. It is
    taken closer by the square root of two, since each of the two arms has half as many samples here
    as an arm of the comparison.

    baseline_ms: `[rounds, 2 * calls]`; a round's first half are the times of its first visit.
    """
    half = baseline_ms.shape[1] // 2
    signs = np.random.default_rng(0).choice((-1.0, 1.0), len(baseline_ms))
    ratios = signs * log_ratios(baseline_ms[:, :half], baseline_ms[:, half:])[:, 0]
    low, high = map(math.log, estimate(ratios).speedup().ci95)
    reach = (high - low) / 2 / math.sqrt(2)
    return math.exp(min(reach, 700.0))


def verdict(
    found: SpeedupEstimate,
    *,
    rounds: int,
    threshold: float = THRESHOLD,
    noise_floor: float | None = None,
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
    is_noise = noise_floor is not None and math.exp(abs(found.log_ratio)) <= noise_floor
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
