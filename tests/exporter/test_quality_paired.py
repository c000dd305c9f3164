"""Intervals over samples: they hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from exporter.measure.quality.paired import mean_interval


def test_equal_samples_give_student_s_interval() -> None:
    means = np.random.default_rng(0).normal(0.3, 0.1, 9)
    found = mean_interval(means * 512, np.full(9, 512.0))
    assert found is not None
    want = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert found.value == pytest.approx(means.mean(), rel=1e-12)
    assert found.ci95 == pytest.approx((want.low, want.high), rel=1e-9)


@pytest.mark.parametrize("samples", [3, 16])
def test_the_truth_lies_inside_about_95_times_in_100(samples: int) -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(50, 500, (400, samples)).astype(float)
    sums = counts * rng.normal(0.2, 0.05, (400, samples))
    found = [mean_interval(*pair) for pair in zip(sums, counts, strict=True)]
    held = np.mean([each is not None and each.ci95[0] < 0.2 < each.ci95[1] for each in found])
    assert 0.90 < held < 0.99


def test_one_sample_or_an_infinite_loss_gives_none() -> None:
    assert mean_interval(np.array([3.0]), np.array([9.0])) is None
    assert mean_interval(np.array([3.0, np.inf]), np.array([9.0, 9.0])) is None
    assert mean_interval(np.zeros(3), np.zeros(3)) is None
