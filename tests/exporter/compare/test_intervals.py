"""Intervals over samples and over rounds hold the truth as often as they say; verdicts of times."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.signal import lfilter

from exporter.artifacts import FEWEST_ROUNDS, Interval, Speedup
from exporter.compare.agreement import COLUMNS, accuracy_of
from exporter.compare.intervals import (
    difference_interval,
    fewest_to_show,
    mean_interval,
    share_interval,
)
from exporter.compare.timing.measuring import TimingBudget
from exporter.compare.timing.statistics import (
    ErrorBudget,
    Milliseconds,
    SpeedupEstimate,
    estimate,
    log_ratios,
    verdict,
    verdict_of_interval,
)
from tests.present import present
from tests.virtual_time import HELD_OUT, RECORDED, BusyMachine, Noise, Replayed, timed


def test_equal_samples_without_skew_give_student_s_interval() -> None:
    half = np.random.default_rng(0).normal(0, 0.1, 4)
    means = 0.3 + np.concatenate([half, -half, [0]])
    interval = mean_interval(means * 512, np.full(9, 512.0))
    assert interval is not None
    want = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert interval.value == pytest.approx(means.mean(), rel=1e-12)
    assert interval.ci95 == pytest.approx((want.low, want.high), rel=1e-9)


_RUNS, _WINDOWS, _TOKENS = 300, 8, 512
_MEAN_KL, _MEAN_RISE, _LEFT = 0.15, 0.05, 0.4


def dependent_texts(quantity: str, per_document: int) -> tuple[Any, Any, Any, float]:
    """Sums, divisors and documents of many texts' windows ``[texts, windows]``, and the truth.

    Tokens follow one another (a first-order autoregression of 0.6), windows have levels of their
    own, and a third of the levels' variance is their documents'. ``log-perplexity``: differences of
    losses, with tails of Student's t of four degrees. ``KL``: log-normal tokens around log-normal
    levels. ``share``: what healing leaves of a cut's rise, a ratio of two such sums.
    """
    rng = np.random.default_rng(0)
    shape = (_RUNS, _WINDOWS)
    documents = np.tile(np.arange(_WINDOWS), (_RUNS, 1))
    if per_document > 1:  # of unequal length, two at least
        lengths = rng.dirichlet(np.full(max(3, round(_WINDOWS / per_document)), 3.0), _RUNS)
        drawn = rng.random((*shape, 1)) > lengths.cumsum(axis=1)[:, None, :-1]
        documents = drawn.sum(axis=2)
        documents[:, :2] = [0, 1]
    of_documents = np.take_along_axis(rng.standard_normal(shape), documents, axis=1)
    own = rng.standard_normal(shape)
    levels = np.sqrt(0.3) * of_documents + np.sqrt(0.7) * own

    def tokens() -> Any:
        return lfilter([0.8], [1, -0.6], rng.standard_normal((*shape, _TOKENS)), axis=2)

    def rises(level: Any) -> Any:
        normal = tokens()
        tails = np.sqrt(4 / rng.chisquare(4, normal.shape))
        return (_MEAN_RISE + 0.04 * level[..., None] + 0.5 * normal * tails).sum(axis=2)

    counts = np.full(shape, float(_TOKENS))
    if quantity == "KL":
        logs = 0.5 * levels[..., None] + 1.3 * tokens()
        sums = np.exp(logs).sum(axis=2) * _MEAN_KL / np.exp((0.5**2 + 1.3**2) / 2)
        return sums, counts, documents, _MEAN_KL
    if quantity == "log-perplexity":
        return rises(levels), counts, documents, _MEAN_RISE
    bare = 4 * _MEAN_RISE * _TOKENS + rises(levels)
    return _LEFT * bare + rises(own) - _MEAN_RISE * _TOKENS, bare, documents, _LEFT


@pytest.mark.parametrize("per_document", [1, 3])
@pytest.mark.parametrize("quantity", ["log-perplexity", "KL", "share"])
def test_intervals_of_few_windows_hold_the_truth_where_percentiles_do_not(
    quantity: str, per_document: int
) -> None:
    *texts, truth = dependent_texts(quantity, per_document)
    rng, held, by_percentiles = np.random.default_rng(1), [], []
    for sums, divisors, documents in zip(*texts, strict=True):
        interval = present(mean_interval(sums, divisors, documents, positive=quantity == "KL"))
        held.append(interval.ci95[0] <= truth <= interval.ci95[1])
        drawn = rng.integers(0, _WINDOWS, (200, _WINDOWS))
        low, high = np.quantile(sums[drawn].sum(1) / divisors[drawn].sum(1), (0.025, 0.975))
        by_percentiles.append(low <= truth <= high)
    assert 0.92 <= np.mean(held) <= 0.985
    assert np.mean(by_percentiles) < 0.91


@pytest.mark.parametrize(
    "interval", [mean_interval, share_interval, partial(difference_interval, np.zeros(5))]
)
def test_samples_of_one_document_count_as_one(interval: Callable[..., Interval | None]) -> None:
    sums, counts = np.array([3.0, 1.0, 4.0, 1.0, 5.0]), np.full(5, 9.0)
    clusters = np.array([4, 9, 4, 0, 0])
    result = interval(sums, counts, clusters=clusters)
    if interval in (mean_interval, share_interval):
        assert result == interval(np.array([6.0, 7.0, 1.0]), np.array([18.0, 18.0, 9.0]))
        assert interval(sums, counts, clusters=np.zeros(5, np.int64)) is None
    else:
        whole = difference_interval(np.zeros(3), np.array([6.0, 7, 1]), np.array([18.0, 18, 9]))
        assert result == whole


@pytest.mark.parametrize(
    ("sums", "counts"), [([3.0], [9.0]), ([3.0, np.inf], [9.0, 9.0]), ([0.0] * 3, [0.0] * 3)]
)
def test_one_sample_or_an_infinite_loss_gives_none(sums: list[float], counts: list[float]) -> None:
    assert mean_interval(np.array(sums), np.array(counts)) is None


@pytest.mark.parametrize("items", [1, 3, 20])
def test_items_that_all_differ_alike_leave_as_much_doubt_as_they_are_few(items: int) -> None:
    zeros, ones = np.zeros(items), np.ones(items)
    unseen = 1 - 0.025 ** (1 / items)
    lost = difference_interval(ones, zeros)
    assert lost.ci95 == pytest.approx((-1.0, -1 + 2 * unseen), abs=1e-12)
    none = difference_interval(ones, ones)
    assert none.ci95 == pytest.approx((-unseen, unseen), abs=1e-12)
    beyond = difference_interval(zeros, 3 * ones)
    assert beyond.ci95 == pytest.approx((3 - 6 * unseen, 3.0), abs=1e-12)


def test_few_items_are_no_loss_and_many_give_student_s_interval() -> None:
    baseline, candidate = np.array([1.0, 1, 1, 0]), np.zeros(4)
    assert difference_interval(baseline, candidate).ci95[1] == 0
    baseline, candidate = np.random.default_rng(2).integers(0, 2, (2, 200)).astype(float)
    want = stats.ttest_1samp(candidate - baseline, 0).confidence_interval(0.95)
    interval = difference_interval(baseline, candidate)
    assert interval.ci95 == pytest.approx((want.low, want.high), abs=0.01)


@pytest.mark.parametrize("share", [0.8, 0.98])
def test_a_share_s_interval_holds_the_truth_about_95_times_in_100(share: float) -> None:
    """Texts differ: tokens of one resemble each other."""
    rng, missed, counts = np.random.default_rng(3), 0, np.full(16, 256.0)
    for _ in range(400):
        own = rng.beta(40 * share, 40 * (1 - share), 16)
        low, high = present(share_interval(rng.binomial(256, own).astype(float), counts)).ci95
        missed += not low <= share <= high
    assert 0.02 <= missed / 400 <= 0.1


@pytest.mark.parametrize("share", [0.5, 0.95, 0.98])
def test_as_many_items_are_needed_as_show_a_share_if_all_are_alike(share: float) -> None:
    number = fewest_to_show(share)
    below, at = (
        present(share_interval(np.ones(items), np.ones(items))).ci95[0]
        for items in (number - 1, number)
    )
    assert below < share <= at


def test_a_share_of_all_tokens_is_as_sure_as_they_are_many() -> None:
    every = present(share_interval(np.full(16, 512.0), np.full(16, 512.0)))
    assert 0.999 < every.ci95[0] < every.ci95[1] == every.value == 1.0
    none = present(share_interval(np.zeros(2), np.full(2, 9.0)))
    assert none.ci95[0] == none.value == 0.0 < none.ci95[1] < 0.3
    assert share_interval(np.array([3.0]), np.array([9.0])) is None


def test_losses_that_later_reports_are_paired_with_are_those_of_documents() -> None:
    """Samples of one document resemble each other: over them an interval is too narrow."""
    sums = np.arange(1.0, 6 * len(COLUMNS) + 1).reshape(len(COLUMNS), 6)
    documents = np.array([7, 7, 2, 2, 2, 5])
    losses = present(accuracy_of(sums, "text", "0" * 64, documents).sample_losses)
    rows = dict(zip(COLUMNS, sums, strict=True))
    names = ("predicted", "baseline_loss", "candidate_loss")
    expected = [[rows[name][documents == n].sum() for n in (2, 5, 7)] for name in names]
    assert [losses.tokens, losses.baseline, losses.candidate] == expected
    alone = present(accuracy_of(sums, "text", "0" * 64).sample_losses)
    assert alone.baseline == rows["baseline_loss"].tolist()


# Of times, synthetic and recorded, with injected slowdowns.


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
        floor = ratio
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


# On a busy machine and on recorded steps.


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """Each trial collects garbage; conftest.py puts aside what was imported before."""
    importlib.import_module("scipy.stats")


def recorded(seed: int) -> Noise:
    with np.load(RECORDED, allow_pickle=False) as file:
        return Replayed(file["2_threads"].astype(np.float64), seed)


@pytest.mark.parametrize("make", [recorded, BusyMachine])
@pytest.mark.parametrize(("slowdown", "trials"), [(1.0, 12), (1.03, 8)])
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
        assert words["faster"] + words["slower"] <= 1, words
    else:
        assert words["slower"] >= 6, words
        assert words["faster"] + words["same"] == 0, words


def test_six_recordings_of_five_minutes_are_held_out() -> None:
    with np.load(HELD_OUT, allow_pickle=False) as file:
        seconds = [file[name].astype(np.float64).sum() / 1000 for name in file.files]
    assert len(seconds) >= 6
    assert min(seconds) > 295
