"""Intervals and verdicts, on synthetic and recorded times with injected slowdowns."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import FEWEST_ROUNDS, NoiseFloor, Speedup
from exporter.compare.timing.measuring import TimingBudget
from exporter.compare.timing.statistics import (
    ErrorBudget,
    Milliseconds,
    SpeedupEstimate,
    as_rounds,
    estimate,
    log_ratios,
    summarize,
    verdict,
    verdict_of_interval,
)
from tests.present import present
from tests.virtual_time import (
    HELD_OUT,
    RECORDED,
    BusyMachine,
    Noise,
    Replayed,
    timed,
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


def words_of(slowdown: float, noise: float) -> Counter[str]:
    pairs = (busy_machine(np.random.default_rng(n), slowdown, noise) for n in range(TRIALS))
    return Counter(verdict(estimate(log_ratios(*pair)), rounds=ROUNDS) for pair in pairs)


def test_a_speedup_of_a_tenth_is_found_and_one_lost_in_noise_is_inconclusive_not_same() -> None:
    sure, lost = words_of(1 / 1.1, noise=0.1), words_of(1.03, noise=0.3)
    assert sure["faster"] >= TRIALS - 1, sure
    assert sure["slower"] == lost["same"] == 0
    assert lost["inconclusive"] >= TRIALS - 2, lost


def test_a_drift_that_both_arms_share_hardly_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    quiet = np.exp(0.02 * rng.standard_normal((2, ROUNDS, CALLS)))
    drift = np.linspace(1, 2, ROUNDS)[:, None]
    still = speedup(10 * quiet[0], 10 * quiet[1])
    drifting = speedup(10 * quiet[0] * drift, 10 * quiet[1] * drift)
    unpaired = speedup(10 * quiet[0] * drift, 10 * quiet[1] * drift[::-1])
    assert width(drifting) < 8 * width(still)
    assert width(drifting) < width(unpaired) / 3


def speedup(baseline: Milliseconds, candidate: Milliseconds) -> Speedup:
    return estimate(log_ratios(baseline, candidate)).speedup()


def width(speedup: Speedup) -> float:
    return speedup.ci95[1] - speedup.ci95[0]


def test_the_ratio_is_that_of_the_rounds_medians_and_lies_in_its_interval() -> None:
    baseline, candidate = busy_machine(np.random.default_rng(3), 1.2, 0.1)
    result = speedup(baseline, candidate)
    by_round = np.median(baseline, axis=1) / np.median(candidate, axis=1)
    assert result.ratio == pytest.approx(np.median(by_round), rel=0.02)
    assert result.ci95[0] < result.ratio < result.ci95[1]
    constant = speedup(np.full((4, 2), 6.0), np.full((4, 2), 3.0))
    assert (constant.ratio, constant.ci95) == (2.0, (2.0, 2.0))


def test_two_noisy_chunks_still_give_an_interval_that_a_report_holds() -> None:
    result = SpeedupEstimate(log_ratio=0.1, std_error=40.0, degrees=1).speedup()
    low, high = result.ci95
    assert low < 1e-9
    assert high > 1e9
    assert Speedup.model_validate_json(result.model_dump_json()) == result


@pytest.mark.parametrize("rounds", [2, 3, 5, FEWEST_ROUNDS, 20])
def test_the_interval_misses_equal_arms_no_more_than_it_may(rounds: int) -> None:
    """Each arm moves by 3 % of its own from round to round; 5 % of 200 trials, and 3 sigma."""
    misses = 0
    for trial in range(200):
        rng = np.random.default_rng(trial)
        own = 10 * np.exp(0.03 * rng.standard_normal((2, rounds, 1)))
        times = own * np.exp(0.005 * rng.standard_normal((2, rounds, 2)))
        low, high = estimate(log_ratios(times[0], times[1])).interval()
        misses += not low <= 1 <= high
    assert 1 <= misses <= 20


def test_there_is_no_verdict_of_few_rounds_or_within_the_noise_floor() -> None:
    result = SpeedupEstimate(0.5, 0.0, 1)
    assert verdict(result, rounds=FEWEST_ROUNDS) == "faster"
    assert verdict(result, rounds=FEWEST_ROUNDS - 1) == "inconclusive"
    result = SpeedupEstimate(np.log(1.05), 0.001, 50)
    for ratio, word in ((1.06, "inconclusive"), (1.04, "faster")):
        floor = NoiseFloor(ratio=ratio, rounds=9, speedup=Speedup(ratio=1, ci95=(0.9, 1.1)))
        assert verdict(result, rounds=50, noise_floor=floor) == word


def lottery(seed: int, groups: int, *, order: float = 0.0) -> Milliseconds:
    """Log ratios of equal arms, 10 rounds a group; loading makes them differ by 5 %."""
    rng = np.random.default_rng(seed)
    loaded = 0.05 * rng.standard_normal((groups, 1)) + order * (-1.0) ** np.arange(groups)[:, None]
    return (loaded + 0.01 * rng.standard_normal((groups, 10))).ravel()


def test_what_loading_does_is_no_difference_between_arms() -> None:
    words = Counter(verdict(estimate(lottery(n, 8), groups=8), rounds=80) for n in range(100))
    blind = Counter(verdict(estimate(lottery(n, 8)), rounds=80) for n in range(100))
    assert words["faster"] + words["slower"] <= 2, words
    assert blind["faster"] + blind["slower"] >= 20, blind


def test_the_order_of_loading_widens_nothing_where_it_alternates() -> None:
    ratios = lottery(0, 8, order=0.2)
    known = estimate(ratios, groups=8, alternating=True)
    assert known.std_error < estimate(ratios, groups=8).std_error / 2
    assert known.log_ratio == pytest.approx(0, abs=2 * known.std_error)
    assert known.degrees == 6


def test_groups_that_are_alike_are_judged_by_their_rounds_too() -> None:
    rng = np.random.default_rng(3)
    alike = 0.05 * rng.standard_normal((160, 2))
    assert estimate(alike, groups=16).degrees > 60
    apart = alike + np.repeat(0.05 * rng.standard_normal(16), 10)[:, None]
    assert estimate(apart, groups=16).degrees == 15


def test_what_hits_both_turns_of_a_round_counts_once() -> None:
    once = 0.05 * np.random.default_rng(0).standard_normal((200, 1))
    twice = np.repeat(once, 2, axis=1)
    assert estimate(twice).std_error == pytest.approx(estimate(once).std_error, rel=0.02)


def test_turns_are_equal_parts_of_a_round() -> None:
    baseline, candidate = np.array([[1.0, 1.0, 4.0, 4.0]]), np.array([[1.0, 1.0, 2.0, 2.0]])
    result = log_ratios(baseline, candidate, turns=2)
    np.testing.assert_allclose(result, [[0, np.log(2)]], rtol=0, atol=1e-15)


def spoilt(value: float) -> Milliseconds:
    times = np.ones((3, 2))
    times[1, 1] = value
    return times


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: log_ratios(np.ones((1, 4)), np.ones((1, 4)), turns=3), r"\b4\b.*\b3\b"),
        (lambda: as_rounds(summarize(np.ones((6, 2))), 5), r"\b12\b.*\b5\b"),
        (lambda: speedup(np.ones((3, 2)), np.ones((2, 2))), r"\(3, 2\).*\(2, 2\)"),
        (lambda: speedup(np.ones((1, 2)), np.ones((1, 2))), r"\b2\b.*\b1\b"),
        (lambda: log_ratios(np.ones((3, 2)), spoilt(0.0)), "0.0 ms"),
        (lambda: log_ratios(np.ones((3, 2)), spoilt(-1.0)), "-1.0 ms"),
        (lambda: log_ratios(np.ones((3, 2)), spoilt(math.nan)), "nan ms"),
        (lambda: log_ratios(np.ones((3, 2)), spoilt(math.inf)), "inf ms"),
    ],
)
def test_times_that_are_none_or_no_pair_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(("equal", "word"), [(0.004, "slower"), (0.0004, "inconclusive")])
def test_equal_arms_have_to_be_excluded_more_strictly_than_the_threshold(
    equal: float, word: str
) -> None:
    result = SpeedupEstimate(-0.03, 0.009, 100)  # 2.2 errors beyond it, 3.3 from equal arms
    assert verdict(result, rounds=50, errors=ErrorBudget(equal=equal, threshold=0.05)) == word


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        ((1.011, 1.2), "faster"),
        ((1.0101, 1.03), "faster"),
        ((1.009, 1.2), "inconclusive"),
        ((0.8, 0.98), "slower"),
        ((1 / 1.03, 1 / 1.0101), "slower"),
        ((0.8, 0.995), "inconclusive"),
        ((0.995, 1.005), "same"),
        ((0.95, 1.05), "inconclusive"),
        ((0.98, 1.0), "inconclusive"),
    ],
)
def test_verdict_goes_by_where_the_whole_interval_lies(
    interval: tuple[float, float], word: str
) -> None:
    assert verdict_of_interval(interval, ROUNDS) == word


def test_summary_keeps_the_order_of_the_samples_and_they_come_back_as_rounds() -> None:
    times = np.array([[5.0, 1.0], [3.0, 11.0]])
    samples = summarize(times)
    assert samples.samples_ms == [5.0, 1.0, 3.0, 11.0]
    assert samples.median_ms == 4.0
    assert samples.p95_ms == pytest.approx(10.1, abs=1e-9)
    assert samples.p99_ms == pytest.approx(10.82, abs=1e-9)
    np.testing.assert_array_equal(as_rounds(samples, 2), times)


# On a busy machine and on recorded steps.


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """Each trial collects garbage; conftest.py puts aside what was imported before."""
    importlib.import_module("scipy.stats")


def recorded(seed: int) -> Noise:
    with np.load(RECORDED, allow_pickle=False) as file:
        return Replayed(file["2_threads"].astype(np.float64), seed)


@pytest.mark.parametrize("make", [recorded, BusyMachine])
@pytest.mark.parametrize(("slowdown", "trials"), [(1.0, 24), (1.03, 16)])
def test_equal_arms_are_hardly_ever_told_apart_and_three_percent_are(
    make: Callable[[int], Noise], slowdown: float, trials: int
) -> None:
    rows = [
        timed(TimingBudget(seconds=60), make(seed), slowdown=slowdown, seed=seed, lottery=0.002)
        for seed in range(trials)
    ]
    assert all(present(row.seconds) < 64 for row in rows)
    words = Counter(row.verdict for row in rows)
    if slowdown == 1:
        assert words["faster"] + words["slower"] <= 2, words
    else:
        assert words["slower"] >= 13, words
        assert words["faster"] + words["same"] == 0, words


def test_six_recordings_of_five_minutes_are_held_out() -> None:
    with np.load(HELD_OUT, allow_pickle=False) as file:
        seconds = [file[name].astype(np.float64).sum() / 1000 for name in file.files]
    assert len(seconds) >= 6
    assert min(seconds) > 295
