"""A language model of a few kilobytes."""

from __future__ import annotations

import sys
from pathlib import Path


def small_model(folder: Path) -> Path:
    """Writes it; its ONNX file."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "exporter"))
    from tiny_lm import write_tiny_lm

    return write_tiny_lm(folder) / "model.onnx"
