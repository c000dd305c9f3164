"""Token ids as a calibration text."""

from __future__ import annotations

from typing import Any

import numpy as np

from exporter.artifacts import CalibrationRef
from exporter.score import CalibrationText


def made_text(ids: Any, mask: Any = None) -> CalibrationText:
    """Of given ids; without a mask all tokens are real."""
    ids = np.asarray(ids, dtype=np.int64)
    mask = np.ones(ids.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    ref = CalibrationRef(
        source="test", samples=len(ids), sequence_length=ids.shape[1], tokens=int(mask.sum()),
        sha256="0" * 64,
    )  # fmt: skip
    return CalibrationText(ref, ids, mask)


def random_text(samples: int = 5, length: int = 12, seed: int = 0) -> CalibrationText:
    """Of ids that every tiny model knows."""
    rng = np.random.default_rng(seed)
    return made_text(rng.integers(3, 64, size=(samples, length)))
