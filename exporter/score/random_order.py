"""Numbers by chance: the baseline that every other metric has to beat.

Formula: ``S`` uniform between 0 and 1, drawn for each attention, MLP and block by NumPy's PCG64;
the same seed and number of layers give the same scores.
Range 0 to 1, no unit, no meaning.
Source: the random baseline of arXiv 2406.15786v6 (Mistral-7B, 4, 8 and 12 attentions: 61.5, 49.6,
39.4 against the cosine's 67.0, 66.9, 64.8).
There are no samples, so there is no standard error: score with several seeds to see the spread.
"""

from __future__ import annotations

import numpy as np

from exporter.score.metric import UNITS, FixedMetric


def drawn(layers: int, seed: int) -> list[list[float]]:
    """``values[layer][unit]``."""
    values: list[list[float]] = np.random.default_rng(seed).random((layers, len(UNITS))).tolist()
    return values


RANDOM = FixedMetric("random", drawn)
