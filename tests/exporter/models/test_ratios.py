"""Ratios of sums over samples, all at once and as they come."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.models.ablation.damage import RatioSums, ratio, ratio_std_error

SUMS = np.array([3.0, 8.0, 0.0, 2.0])


@pytest.mark.parametrize(
    "weights", [[2.0, 4.0, 0.0, 1.0], [2.0, 4.0, 3.0, 1.0], [2.0, 0.0, 0.0, 0.0]]
)
def test_running_sums_have_the_standard_errors_of_all_samples_at_once(weights: list[float]) -> None:
    counts = np.array(weights)
    sums = np.where(counts > 0, SUMS, 0.0)
    running = RatioSums((1,))
    for part in (slice(0, 1), slice(1, 4)):
        running.add(sums[None, part], counts[part])
    wanted, result = ratio_std_error(sums, counts), running.std_errors
    assert running.means[0] == ratio(sums, counts)
    assert (None if result is None else pytest.approx(float(result[0]))) == wanted
