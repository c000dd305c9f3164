"""Intervals over samples: they hold the truth as often as they say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.signal import lfilter

from exporter.artifacts import Interval
from exporter.compare.agreement import COLUMNS, accuracy_of
from exporter.compare.intervals import (
    difference_interval,
    fewest_to_show,
    mcnemar_p,
    mean_interval,
    share_interval,
)
from tests.present import present


def test_equal_samples_without_skew_give_student_s_interval() -> None:
    half = np.random.default_rng(0).normal(0, 0.1, 4)
    means = 0.3 + np.concatenate([half, -half, [0]])
    interval = mean_interval(means * 512, np.full(9, 512.0))
    assert interval is not None
    want = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert interval.value == pytest.approx(means.mean(), rel=1e-12)
    assert interval.ci95 == pytest.approx((want.low, want.high), rel=1e-9)


@pytest.mark.parametrize("samples", [3, 16])
def test_the_truth_lies_inside_about_95_times_in_100(samples: int) -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(50, 500, (400, samples)).astype(float)
    sums = counts * rng.normal(0.2, 0.05, (400, samples))
    intervals = [present(mean_interval(*pair)).ci95 for pair in zip(sums, counts, strict=True)]
    assert 0.90 < np.mean([low < 0.2 < high for low, high in intervals]) < 0.99


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


def test_few_items_are_no_loss_where_mcnemar_sees_none_and_many_give_student_s_interval() -> None:
    baseline, candidate = np.array([1.0, 1, 1, 0]), np.zeros(4)
    assert mcnemar_p(3, 0) == pytest.approx(0.25, abs=1e-12)
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
