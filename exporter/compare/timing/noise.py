"""The noise floor: the baseline against itself, from the same rounds.

Each round visits the baseline twice. One of the two visits, drawn, plays the first arm and the
other the second: an A/A run that costs no time and has met the same disturbances.
"""

from __future__ import annotations

import math

import numpy as np

from exporter.artifacts import NoiseFloor
from exporter.compare.timing.statistics import Milliseconds, estimate, log_ratios


def noise_floor(baseline_ms: Milliseconds, *, seed: int = 0) -> NoiseFloor:
    """What the baseline against itself gives.

    Which visit plays which arm is drawn, so the true ratio is 1, and the floor is how far from it
    such a ratio comes to lie in 95 of 100 sessions: half the width of its interval. It is taken
    closer by the square root of two, since each of the two arms has half as many samples here as an
    arm of the comparison.

    Args:
        baseline_ms: ``[rounds, 2 * calls]``; a round's first half are the times of its first visit.
        seed: Draws which visit plays which arm.
    """
    half = baseline_ms.shape[1] // 2
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), len(baseline_ms))
    ratios = signs * log_ratios(baseline_ms[:, :half], baseline_ms[:, half:])[:, 0]
    found = estimate(ratios)
    speedup = found.speedup()
    low, high = map(math.log, speedup.ci95)
    reach = (high - low) / 2 / math.sqrt(2)
    return NoiseFloor(ratio=math.exp(min(reach, 700.0)), rounds=len(ratios), speedup=speedup)
