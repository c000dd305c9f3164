"""What bootstraps of few units need to be honest."""

from __future__ import annotations

import math


def expanded_level(units: int, confidence: float = 0.95) -> float:
    """The nominal level at which a percentile interval is as wide as Student's t interval.

    Resampling so many units varies too little, and the more so the fewer they are: Hesterberg,
    "What Teachers Should Know about the Bootstrap", 2014, arXiv 1411.5279, expanded percentile
    interval.

    Args:
        units: What is drawn; two at least.
        confidence: The level that is meant.
    """
    from scipy import stats

    quantile = stats.t.ppf((1 + confidence) / 2, units - 1) * math.sqrt(units / (units - 1))
    return float(1 - 2 * stats.norm.sf(quantile))
