"""From an estimate to a word: each verdict, and the near miss that must not get it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.artifacts import ComparisonReport
from exporter.compare.timing.statistics import estimate, log_ratios, summarize
from exporter.errors import OptionError
from exporter.gate.gate import BaselineMatch, check
from exporter.gate.limits import (
    CheckedValue,
    Limits,
    checked,
    difference_interval,
    joined_floor,
    overall,
    ratio_interval,
)
from exporter.option_types import amount
from tests.made_reports import gate_report, gate_row

TIME = CheckedValue("time", "decode", before=100, after=100, value=1.0, ci95=(0.99, 1.01))


def time(value: float, low: float, high: float, **changes: object) -> CheckedValue:
    return replace(TIME, value=value, ci95=(low, high), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("estimate", "limit", "verdict"),
    [
        (time(1.06, 1.04, 1.08), 1.03, "regressed"),
        (time(1.06, 1.02, 1.10), 1.03, "inconclusive"),  # the limit lies inside
        (time(1.06, 1.04, 1.08, noise_floor=0.1), 1.03, "inconclusive"),  # equal arms differ more
        (time(1.06, 1.01, 1.12), 1.0, "inconclusive"),  # equal arms do that once in a hundred
        (time(0.94, 0.90, 0.99), 1.03, "within_limit"),  # and that
        (time(1.06, 1.04, 1.08, doubt="Too few rounds."), 1.03, "inconclusive"),
        (time(0.90, 0.80, 1.00, doubt="Too few rounds."), 1.03, "inconclusive"),
        (time(1.00, 0.99, 1.01), 1.03, "within_limit"),
        (time(1.02, 1.01, 1.03), 1.03, "within_limit"),  # worse for sure, and allowed
        (time(0.90, 0.88, 0.92), 1.03, "improved"),
        (time(0.90, 0.80, 1.01), 1.03, "within_limit"),  # not sure to be better
        (time(0.99, 0.985, 0.995, noise_floor=0.02), 1.03, "within_limit"),  # noise
        (time(1.00, 0.99, 1.01), 1.0, "inconclusive"),  # no slowdown at all can't be shown
        (time(0.98, 0.97, 0.99), 1.0, "improved"),
        (time(math.nan, 0.97, 0.99), 1.0, "inconclusive"),
        (time(0.98, math.nan, 0.99), 1.0, "inconclusive"),
        (time(0.98, 0.97, math.nan), 1.0, "inconclusive"),
    ],
)
def test_a_time_gets_the_word_that_its_interval_allows(
    estimate: CheckedValue, limit: float, verdict: str
) -> None:
    assert checked(estimate, limit).verdict == verdict


_RATIOS = st.floats(0.5, 2.0)
_WIDTHS = st.floats(1.0001, 1.2)


@given(_RATIOS, _WIDTHS, st.floats(0, 0.1), st.floats(0, 0.2), st.floats(1.0, 1.2))
def test_worse_times_never_get_a_better_word(
    value: float, width: float, floor: float, limit: float, worse: float
) -> None:
    order = ["improved", "within_limit", "inconclusive", "regressed"]
    first, second = (
        checked(time(v, v / width, v * width, noise_floor=floor), 1 + limit).verdict
        for v in (value, value * worse)
    )
    assert order.index(first) <= order.index(second)


def test_the_worst_word_counts() -> None:
    assert overall(["improved", "within_limit", "inconclusive"]) == "inconclusive"
    assert overall(["within_limit", "improved"]) == "improved"


def test_the_interval_of_two_sessions_is_wider_than_each_and_narrower_than_both() -> None:
    low, high = ratio_interval(1.2, (1.1, 1.3), 1.0, (0.95, 1.06))
    assert 1.1 / 1.06 < low < 1.1 / 1.0 < 1.2 < 1.3 < high < 1.3 / 0.95
    assert ratio_interval(1.2, (1.1, 1.3), 1.0, (1.0, 1.0)) == pytest.approx((1.1, 1.3), rel=1e-12)
    assert joined_floor(0.0, 0.03) == pytest.approx(0.03, rel=1e-12)  # so do floors
    assert 0.03 < joined_floor(0.03, 0.03) < 0.06


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_it_covers_the_truth_as_often_as_it_says(spread: float) -> None:
    """Normal estimates: the difference of two 95 % intervals is again one of 95 %."""
    rng = np.random.default_rng(3)
    deviations = 1.0, spread
    missed = 0
    for first, second in rng.normal(0, deviations, (4000, 2)):
        bounds = [
            (v - 1.96 * s, v + 1.96 * s) for v, s in zip((first, second), deviations, strict=True)
        ]
        low, high = difference_interval(first, bounds[0], second, bounds[1])
        missed += not low <= 0 <= high
    assert 0.04 < missed / 4000 < 0.06


@pytest.mark.parametrize(
    ("text", "value"), [("3%", 0.03), (" 0.5 % ", 0.005), ("0.03", 0.03), ("1.1", 1.1), (2, 2.0)]
)
def test_amounts_are_shares_or_numbers(text: str | float, value: float) -> None:
    assert amount(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", ["", "3x", "%", "three", "nan", "3%%", "1,5"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"1\.1 .* 110%"):
        amount(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_slowdown": -0.01},
        {"max_kl": math.nan},
        {"min_speedup": 0.0},
        {"min_top1_agreement": 95.0},
        {"min_embedding_cosine": 1.5},
        {"max_size_increase": math.inf},
        {"max_slowdown": "3"},  # a bare number above 1 is no share
        {"min_top1_agreement": 90},
    ],
)
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        Limits(**wrong)
    assert caught.value.keys == tuple(wrong)


ROUNDS, CALLS, GROUPS, TRIALS = 48, 8, 12, 40


def session(rng: np.random.Generator, slowdown: float) -> ComparisonReport:
    """A wandering load on both arms, bursts of twice the time, arms loaded anew."""
    drift = np.zeros((ROUNDS, 1))
    for number in range(1, ROUNDS):
        drift[number] = 0.8 * drift[number - 1] + rng.normal(0, 0.1)

    def arm(median_ms: float) -> np.ndarray:
        loading = rng.normal(0, 0.005, GROUPS).repeat(ROUNDS // GROUPS)[:, None]
        times = np.exp(drift + loading + rng.normal(0, 0.06, (ROUNDS, CALLS)))
        return median_ms * times * np.where(rng.random((ROUNDS, CALLS)) < 0.05, 2, 1)

    baseline, candidate = arm(100.0), arm(80.0 * slowdown)
    row = gate_row(
        rounds=ROUNDS,
        builds=GROUPS,
        baseline=summarize(baseline),
        candidate=summarize(candidate),
        speedup=estimate(log_ratios(baseline, candidate, turns=2), groups=GROUPS).speedup(),
    )
    return gate_report([row])


@pytest.mark.parametrize(
    ("slowdown", "limit", "least", "most"),
    [
        (1.0, 0.03, 0, 0),  # of 1000 trials none was called a regression
        (1.0, 0.0, 0, 1),  # nor with no slack at all
        (1.1, 0.03, 38, TRIALS),  # 998 were
    ],
)
def test_two_sessions_regress_where_the_candidate_did(
    slowdown: float, limit: float, least: int, most: int
) -> None:
    words: Counter[str] = Counter()
    for trial in range(TRIALS):
        rng = np.random.default_rng([trial, round(100 * slowdown)])
        old, new = session(rng, 1.0), session(rng, slowdown)
        words[check(new, Limits(max_slowdown=limit), baseline=BaselineMatch(old)).verdict] += 1
    assert least <= words["regressed"] <= most, words
    assert slowdown == 1.0 or words["improved"] == 0
