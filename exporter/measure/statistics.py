"""What the raw times say, and how sure it is.

The speedup is the ratio of the two medians over all samples. Its interval comes from a paired
bootstrap over rounds: a round holds samples of both arms, taken close to one another, so whatever
slowed the machine for a while is drawn for both arms or for neither.

With few rounds a plain percentile interval is too narrow: two sessions of one and the same model
were called different now and then. It is widened as Hesterberg proposes ("What Teachers Should Know
about the Bootstrap", 2014, arXiv 1411.5279, expanded percentile interval): the percentiles are
those that make it as wide as a t interval would be for a mean of so many rounds.

Widening doesn't help where there are hardly any rounds to draw from: no percentile lies beyond the
most extreme draw. For two equal arms, each of which moves by 3 % of its own from round to round,
the interval misses the truth, and a word by it alone would be a false *faster* or *slower*, so
often (2000 trials; ``tests/benchmarks/bench_latency.py`` prints the table):

======  ======  ===========
rounds  misses  false words
======  ======  ===========
2       52 %    35 %
3       24 %    13 %
4       12 %    5 %
5       7 %     2 %
6       3 %     1 %
======  ======  ===========

So there is no verdict below 6 rounds, :data:`exporter.artifacts.FEWEST_ROUNDS`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import FEWEST_ROUNDS, LatencySamples, Speedup, VerdictWord

Milliseconds = NDArray[np.float64]

THRESHOLD = 0.01
"""Below one percent a difference counts as none."""

_RESAMPLES = 5000
_CONFIDENCE = 0.95


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


def paired_speedup(baseline_ms: Milliseconds, candidate_ms: Milliseconds, *, seed: int) -> Speedup:
    """Median of the baseline over median of the candidate, with a 95 % interval.

    Args:
        baseline_ms: ``[rounds, calls]``.
        candidate_ms: ``[rounds, calls]``; row *i* was taken in the same round as the baseline's.
        seed: For the resampling.

    Raises:
        ValueError: With other shapes, or fewer than two rounds.
    """
    from scipy import stats

    if baseline_ms.shape != candidate_ms.shape or baseline_ms.ndim != 2:
        raise ValueError(f"shapes {baseline_ms.shape} and {candidate_ms.shape} are no pair")
    if len(baseline_ms) < 2:
        raise ValueError("an interval needs at least two rounds")

    def ratio_of_medians(rounds: NDArray[Any], axis: int) -> NDArray[np.float64]:  # noqa: ARG001
        drawn = rounds.astype(np.intp)  # scipy resamples row numbers; it wants the axis named
        return _pooled_median(baseline_ms[drawn]) / _pooled_median(candidate_ms[drawn])

    result = stats.bootstrap(
        (np.arange(len(baseline_ms)),),
        ratio_of_medians,
        vectorized=True,
        batch=_batch_for(baseline_ms.size),
        n_resamples=_RESAMPLES,
        confidence_level=_expanded_level(len(baseline_ms)),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    ratio = float(np.median(baseline_ms) / np.median(candidate_ms))
    return Speedup(ratio=ratio, ci95=(float(interval.low), float(interval.high)))


def _expanded_level(rounds: int) -> float:
    """The nominal level whose percentile interval covers 95 % with so many rounds."""
    from scipy import stats

    quantile = stats.t.ppf((1 + _CONFIDENCE) / 2, rounds - 1) * math.sqrt(rounds / (rounds - 1))
    return float(1 - 2 * stats.norm.sf(quantile))


def _pooled_median(samples_ms: Milliseconds) -> NDArray[np.float64]:
    """Median over the last two axes: the drawn rounds, and the calls in each."""
    pooled: NDArray[np.float64] = np.median(samples_ms, axis=(-2, -1))
    return pooled


def _batch_for(samples: int) -> int:
    return max(1, min(_RESAMPLES, 4_000_000 // samples))


def verdict(speedup: Speedup, *, rounds: int, threshold: float = THRESHOLD) -> VerdictWord:
    """One word for a speedup, by where its whole interval lies.

    ``faster``: all of it above ``1 + threshold``. ``slower``: all of it below
    ``1 / (1 + threshold)``. ``same``: all of it between the two. Otherwise ``inconclusive``: the
    measurement was too short or the machine too busy to tell. With fewer than
    ``FEWEST_ROUNDS`` rounds it is always ``inconclusive``.
    """
    if rounds < FEWEST_ROUNDS:
        return "inconclusive"
    low, high = speedup.ci95
    if low > 1 + threshold:
        return "faster"
    if high < 1 / (1 + threshold):
        return "slower"
    if 1 / (1 + threshold) <= low and high <= 1 + threshold:
        return "same"
    return "inconclusive"
