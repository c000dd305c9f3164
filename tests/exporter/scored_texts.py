"""Token ids as a calibration text."""

from __future__ import annotations

from typing import Any

import numpy as np

from exporter.score import CalibrationText


def made_text(ids: Any, mask: Any = None) -> CalibrationText:
    """Of given ids; without a mask all tokens are real."""
    ids = np.asarray(ids, dtype=np.int64)
    text = CalibrationText.unpadded(ids, "test", "0" * 64)
    if mask is None:
        return text
    real = np.asarray(mask, dtype=bool)
    return CalibrationText(text.ref.model_copy(update={"tokens": int(real.sum())}), ids, real)


def random_text(samples: int = 5, length: int = 12, seed: int = 0) -> CalibrationText:
    """Of ids that every tiny model knows."""
    rng = np.random.default_rng(seed)
    return made_text(rng.integers(3, 64, size=(samples, length)))
