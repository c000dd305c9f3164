"""What the raw times say, and how sure it is.

A round holds two *turns* of both arms, one right after the other (ABBA or BAAB). The log ratio of a
turn, the median of the baseline's times over the median of the candidate's, is free of whatever
slowed the machine for longer than the turn. The order of the arms is drawn, so under equal arms
each log ratio is as likely positive as negative, however the noise wanders: log ratios of rounds
are then uncorrelated and symmetric, which is what the intervals here rest on.

The speedup is the *midmean* of the log ratios: the mean of their middle half, so that bursts of
other work don't move it. In simulations it was among the best of means, trimmed means, Huber's and
Tukey's estimators, over turns or rounds, by load or over all: its standard deviation is 0.9 of that
of a mean over loads of trimmed means of rounds where noise has a median of twice the minimum, and
0.7 of it where a load comes midway. Its variance is that of Tukey and McLaughlin (1963): it is
that of winsorised values, whose sums over rounds are what counts.

Rounds of one *group* share what was loaded: where the weights lie in memory, or one of several
builds of an engine. That alone can make two equal arms differ by percents, for as long as they
stay loaded, and no number of rounds tells it. So with several groups their sums are what counts
(Kalibera and Jones, "Rigorous Benchmarking in Reasonable Time", ISMM 2013), and the interval is as
wide as groups differ. Where there are many, and they differ by no more than their own rounds
explain, both variances are pooled. In simulations with 8 and 16 groups, which differed by nothing
to 20 times as much as their rounds explained, the 95 % interval missed the truth in 3 to 6 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from exporter.artifacts import FEWEST_ROUNDS, LatencyRow, LatencySamples, Speedup
from exporter.compare.quality.intervals import expanded_level
from exporter.models.ablation.damage import ratio_std_error

Milliseconds = NDArray[np.float64]

TURNS = 2
"""Of each arm in a round."""

_TRIM = 0.25
_MANY_GROUPS = 8  # fewer can't tell whether they differ
_EXPLAINED = 1.2  # times the variance that rounds explain: groups that differ by less are alike
_RESAMPLES = 4000
_BATCH = 500
_CONFIDENCE = 0.95
_FURTHEST = 27.0
"""Of a logarithm of a ratio: that of a report ends before it."""


def summarize(samples_ms: Milliseconds) -> LatencySamples:
    """Percentiles of one arm's times.

    Args:
        samples_ms: ``[rounds, calls]``, in the order in which they were taken.
    """
    flat = np.asarray(samples_ms, dtype=np.float64).ravel()
    p50, p95, p99 = np.percentile(flat, [50, 95, 99])
    return LatencySamples(
        median_ms=float(p50),
        p50_ms=float(p50),
        p95_ms=float(p95),
        p99_ms=float(p99),
        samples_ms=[float(value) for value in flat],
    )


def as_rounds(samples: LatencySamples, rounds: int) -> Milliseconds:
    """A saved arm's times as they were taken, ``[rounds, calls]``.

    Raises:
        ValueError: They don't fall into so many equal parts.
    """
    times = np.asarray(samples.samples_ms, dtype=np.float64)
    if rounds < 1 or not times.size or times.size % rounds:
        raise ValueError(f"{times.size} samples are not {rounds} equal rounds")
    return times.reshape(rounds, -1)


def log_ratios(
    baseline_ms: Milliseconds, candidate_ms: Milliseconds, *, turns: int = 1
) -> NDArray[np.float64]:
    """By turn, the log of the median of the baseline over that of the candidate.

    Args:
        baseline_ms: ``[rounds, calls]``, the calls of the first turn first.
        candidate_ms: ``[rounds, calls]``; row *i* was taken in the same round as the baseline's.
        turns: Of a round, with as many calls each.

    Returns:
        ``[rounds, turns]``; above 0 where the candidate was faster.

    Raises:
        ValueError: Another number of rounds, calls that aren't so many turns, or times that aren't
            positive and finite.
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
    found: NDArray[np.float64] = np.log(medians[0] / medians[1])
    return found


@dataclass(frozen=True)
class SpeedupEstimate:
    """A log speedup and how sure it is.

    Attributes:
        log_ratio: Above 0 the candidate is faster.
        std_error: Of it.
        degrees: Of freedom of the standard error.
    """

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

    Args:
        ratios: ``[rounds, turns]``, see :func:`log_ratios`; at least two rounds.
        groups: Parts, in order, each with arms loaded anew (or another build of them). They are as
            equal as can be: the first ones have one round more.
        alternating: In every second group the arms were loaded the other way round. What the order
            of loading does is then no part of the spread.

    Raises:
        ValueError: Fewer than two rounds, or fewer rounds than groups.
    """
    if len(ratios) < 2:
        raise ValueError(f"an interval needs at least 2 rounds, not {len(ratios)}")
    grouped, strata = _grouped(ratios, groups), _strata(groups, alternating=alternating)
    # The strata's mean: their order is no part of the spread.
    centre = float(np.mean([_midmean(grouped[n::strata].ravel()) for n in range(strata)]))
    between, within = spreads(ratios, groups=groups, alternating=alternating)
    found = within if groups == 1 else _pooled(between, within, groups)
    error = math.sqrt(found.variance)
    # Zero for times that agree to the last bits of a double.
    return SpeedupEstimate(centre, 0.0 if error < 1e-13 else error, found.degrees)


def spreads(
    ratios: NDArray[np.float64], *, groups: int, alternating: bool
) -> tuple[Spread, Spread]:
    """How groups differ, which is nothing where there is one, and what their rounds explain.

    Of the estimate; see :func:`estimate` for the arguments.
    """
    grouped, strata = _grouped(ratios, groups), _strata(groups, alternating=alternating)
    parts = [_winsorised(grouped[n::strata]) for n in range(strata)]
    between = Spread(0.0, 0) if groups == 1 else _mean_of(list(map(_between, parts)))
    return between, _mean_of(list(map(_within, parts)))


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
    found = np.full((groups, -(-len(ratios) // groups), by_round.shape[1]), np.nan)
    for group, part in zip(found, np.array_split(by_round, groups), strict=True):
        group[: len(part)] = part
    return found


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


def paired_speedup(
    baseline_ms: Milliseconds,
    candidate_ms: Milliseconds,
    *,
    seed: int,
    turns: int = 1,
    groups: int = 1,
    alternating: bool = False,
) -> Speedup:
    """The speedup of rounds with a 95 % interval from a hierarchical bootstrap.

    Groups are drawn, each with all its rounds, or the rounds of one group; what is drawn is drawn
    for both arms. Drawing rounds within drawn groups, too, would count their scatter twice (Ren et
    al., "Nonparametric bootstrapping for hierarchical data", J. Appl. Statistics 2010). The
    percentiles are those that make the interval as wide as a t interval for so many groups (or
    rounds, of one group) would be: Hesterberg, "What Teachers Should Know about the Bootstrap",
    2014, arXiv 1411.5279, expanded percentile interval. A bound of the t interval counts instead
    where that is farther out: alone, the bootstrap's held the truth in 93 % of simulated rows.

    Args:
        baseline_ms: ``[rounds, calls]``.
        candidate_ms: ``[rounds, calls]``; row *i* was taken in the same round as the baseline's.
        seed: For the resampling.
        turns: See :func:`log_ratios`.
        groups: See :func:`estimate`.
        alternating: Likewise; groups of either order are then drawn for one another.

    Raises:
        ValueError: With other shapes, times that aren't positive and finite, or fewer than two
            rounds.
    """
    ratios = log_ratios(baseline_ms, candidate_ms, turns=turns)
    found = estimate(ratios, groups=groups, alternating=alternating)
    strata = _strata(groups, alternating=alternating)
    drawn = _resampled(_grouped(ratios, groups), strata, np.random.default_rng(seed))
    units = groups + 1 - strata if groups > 1 else len(ratios)
    outside = (1 - expanded_level(units)) / 2
    low, high = np.exp(np.quantile(drawn, [outside, 1 - outside]))
    wide = found.interval()
    low, high = min(low, wide[0]), max(high, wide[1])
    return Speedup(ratio=found.ratio, ci95=(float(low), float(high)))


def _resampled(
    ratios: NDArray[np.float64], strata: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Log speedups of resampled ``[groups, rounds, turns]``, some at a time."""
    if len(ratios) == 1:  # its rounds are what is drawn
        ratios = ratios.swapaxes(0, 1)
    units = len(ratios)
    stratum = np.arange(units) % strata
    sizes = np.bincount(stratum)[stratum]
    found = []
    for _ in range(_RESAMPLES // _BATCH):
        drawn = ratios[stratum + strata * rng.integers(sizes, size=(_BATCH, units))]
        parts = [drawn[:, n::strata].reshape(_BATCH, -1) for n in range(strata)]
        found.append(np.mean([_midmean(part) for part in parts], axis=0))
    return np.concatenate(found)


def times_of(row: LatencyRow) -> dict[str, LatencySamples]:
    """All arms' times of a recorded row, by name."""
    return {"baseline": row.baseline, "candidate": row.candidate, **row.references}


def estimate_between(
    row: LatencyRow, first: str = "baseline", second: str = "candidate"
) -> SpeedupEstimate:
    """How much faster one arm of a recorded row is than another.

    Args:
        row: For an interval that counts loads, both arms were loaded
            anew when the first two were.
        first: The name of the arm that is to be beaten.
        second: The other's.

    Raises:
        ValueError: The row's samples don't fall into its rounds and their turns.
    """
    return estimate(ratios_between(row, first, second), **_grouping(row))


def ratios_between(
    row: LatencyRow, first: str = "baseline", second: str = "candidate"
) -> NDArray[np.float64]:
    """The log ratios of a recorded row's turns, see :func:`log_ratios`."""
    return log_ratios(*_rounds(row, first, second), turns=TURNS)


def speedup_between(row: LatencyRow, first: str = "baseline", second: str = "candidate") -> Speedup:
    """The same, with its interval as the row's own speedup has it."""
    return paired_speedup(*_rounds(row, first, second), seed=0, turns=TURNS, **_grouping(row))


def _rounds(row: LatencyRow, *names: str) -> list[Milliseconds]:
    times = times_of(row)
    return [as_rounds(times[name], row.rounds) for name in names]


def _grouping(row: LatencyRow) -> dict[str, Any]:
    several = row.builds > 1
    return {
        "groups": row.builds if several else row.loads,
        "alternating": row.loads > 1 and not several,
    }
