"""The gate on sessions of a busy machine: samples, intervals and verdicts, all but the clock."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from exporter.artifacts import ComparisonReport
from exporter.compare.timing.statistics import estimate, log_ratios, summarize
from exporter.gate.gate import BaselineMatch, check
from exporter.gate.limits import Limits
from tests.made_reports import gate_report, gate_row

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
