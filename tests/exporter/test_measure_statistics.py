"""Percentiles, intervals and verdicts, on synthetic times with injected noise and slowdowns."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from exporter.artifacts import FEWEST_ROUNDS, Speedup
from exporter.measure.statistics import (
    Milliseconds,
    paired_speedup,
    summarize,
    verdict,
)

ROUNDS, CALLS = 24, 8
TRIALS = 20  # the full tables of false alarms and of power are benchmarks


def busy_machine(
    rng: np.random.Generator, slowdown: float, noise: float
) -> tuple[Milliseconds, Milliseconds]:
    """Times of two arms: a drift that both share, one of their own, and a heavy tail."""
    shared = np.exp(noise * rng.standard_normal((ROUNDS, 1)))

    def arm(median_ms: float) -> Milliseconds:
        own = np.exp(0.3 * noise * rng.standard_normal((ROUNDS, 1)))
        jitter = np.exp(0.02 * rng.standard_normal((ROUNDS, CALLS)))
        tail = 1 + noise * rng.exponential(1, (ROUNDS, CALLS)) * (rng.random((ROUNDS, CALLS)) < 0.3)
        return median_ms * shared * own * jitter * tail

    return arm(30.0), arm(30.0 * slowdown)


def verdicts(slowdown: float, noise: float, trials: int = TRIALS) -> Counter[str]:
    found: Counter[str] = Counter()
    for trial in range(trials):
        baseline, candidate = busy_machine(np.random.default_rng(trial), slowdown, noise)
        found[verdict(paired_speedup(baseline, candidate, seed=trial), rounds=ROUNDS)] += 1
    return found


@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_equal_arms_are_never_called_different(noise: float) -> None:
    found = verdicts(1.0, noise)
    assert found["faster"] + found["slower"] == 0, found


def test_a_slowdown_of_five_percent_is_found_on_a_quiet_machine() -> None:
    assert verdicts(1.05, noise=0.02) == {"slower": TRIALS}


def test_a_speedup_of_a_tenth_is_found_on_a_noisy_machine() -> None:
    found = verdicts(1 / 1.1, noise=0.1)
    assert found["faster"] >= TRIALS - 1, found
    assert found["slower"] == 0


def test_a_slowdown_lost_in_noise_is_inconclusive_not_same() -> None:
    found = verdicts(1.03, noise=0.3)
    assert found["same"] == 0
    assert found["inconclusive"] >= TRIALS - 2, found


def test_a_drift_that_both_arms_share_hardly_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    quiet = np.exp(0.02 * rng.standard_normal((2, ROUNDS, CALLS)))
    drift = np.linspace(1, 2, ROUNDS)[:, None]
    still = paired_speedup(10 * quiet[0], 10 * quiet[1], seed=0)
    drifting = paired_speedup(10 * quiet[0] * drift, 10 * quiet[1] * drift, seed=0)
    unpaired = paired_speedup(10 * quiet[0] * drift, 10 * quiet[1] * drift[::-1], seed=0)
    assert width(drifting) < 8 * width(still)
    assert width(drifting) < width(unpaired) / 3


def width(speedup: Speedup) -> float:
    return speedup.ci95[1] - speedup.ci95[0]


def test_the_ratio_is_that_of_the_medians_and_lies_in_its_interval() -> None:
    baseline, candidate = busy_machine(np.random.default_rng(3), 1.2, 0.1)
    found = paired_speedup(baseline, candidate, seed=0)
    assert found.ratio == pytest.approx(np.median(baseline) / np.median(candidate), rel=1e-12)
    assert found.ci95[0] < found.ratio < found.ci95[1]
    assert found == paired_speedup(baseline, candidate, seed=0)


def test_constant_times_have_an_interval_of_no_width() -> None:
    found = paired_speedup(np.full((4, 2), 6.0), np.full((4, 2), 3.0), seed=0)
    assert (found.ratio, found.ci95) == (2.0, (2.0, 2.0))


def equal_arms_of_few_rounds(rounds: int, trials: int = 100) -> tuple[float, float, Counter[str]]:
    """Shares of intervals that miss 1 and of false words by the interval alone; the verdicts.

    Each arm moves by 3 % of its own from round to round.
    """
    misses = false_words = 0
    words: Counter[str] = Counter()
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        own = 10 * np.exp(0.03 * rng.standard_normal((2, rounds, 1)))
        times = own * np.exp(0.005 * rng.standard_normal((2, rounds, 2)))
        speedup = paired_speedup(times[0], times[1], seed=0)
        misses += not speedup.ci95[0] <= 1 <= speedup.ci95[1]
        false_words += verdict(speedup, rounds=ROUNDS) in ("faster", "slower")
        words[verdict(speedup, rounds=rounds)] += 1
    return misses / trials, false_words / trials, words


@pytest.mark.parametrize("rounds", [2, 3, 4, 5])
def test_there_is_no_verdict_where_the_interval_is_none_of_95_percent(rounds: int) -> None:
    misses, false_words, words = equal_arms_of_few_rounds(rounds)
    assert misses > 0.05
    assert false_words > 0.01
    assert words == {"inconclusive": 100}


def test_from_six_rounds_on_the_interval_holds_and_words_are_given() -> None:
    misses, false_words, words = equal_arms_of_few_rounds(FEWEST_ROUNDS)
    assert misses <= 0.07
    assert false_words <= 0.03
    assert words["faster"] + words["slower"] <= 3
    constant = np.full((FEWEST_ROUNDS, 2), 6.0)
    found = paired_speedup(constant, constant / 2, seed=0)
    assert verdict(found, rounds=FEWEST_ROUNDS) == "faster"
    assert verdict(found, rounds=FEWEST_ROUNDS - 1) == "inconclusive"


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        ((1.011, 1.2), "faster"),
        ((1.009, 1.2), "inconclusive"),
        ((0.8, 0.98), "slower"),
        ((0.8, 0.995), "inconclusive"),
        ((0.995, 1.005), "same"),
        ((0.95, 1.05), "inconclusive"),
        ((0.98, 1.0), "inconclusive"),
    ],
)
def test_verdict_goes_by_where_the_whole_interval_lies(
    interval: tuple[float, float], word: str
) -> None:
    assert verdict(Speedup(ratio=1.0, ci95=interval), rounds=ROUNDS) == word


def test_the_verdict_is_symmetric_in_the_arms() -> None:
    fast = Speedup(ratio=1.02, ci95=(1.0101, 1.03))
    slow = Speedup(ratio=1 / 1.02, ci95=(1 / 1.03, 1 / 1.0101))
    words = [verdict(speedup, rounds=ROUNDS) for speedup in (fast, slow)]
    assert words == ["faster", "slower"]


def test_unpaired_or_single_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="no pair"):
        paired_speedup(np.ones((3, 2)), np.ones((2, 2)), seed=0)
    with pytest.raises(ValueError, match="two rounds"):
        paired_speedup(np.ones((1, 2)), np.ones((1, 2)), seed=0)


def test_summary_keeps_the_order_of_the_samples() -> None:
    found = summarize(np.array([[5.0, 1.0], [3.0, 11.0]]))
    assert found.samples_ms == [5.0, 1.0, 3.0, 11.0]
    assert found.median_ms == found.p50_ms == 4.0
    assert found.p95_ms == pytest.approx(10.1, abs=1e-9)
    assert found.p99_ms == pytest.approx(10.82, abs=1e-9)
