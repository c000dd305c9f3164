"""How far a quantised graph's results are from the float graph's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.cut.oracle.inputs import cases, draw
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import QuantizationError
from exporter.models.ablation.damage import Distributions, divergence
from graph_passes.files.storage import load_model

# No model knows what follows random tokens: int4 alone gave 1.5 there on SmolLM2, a broken graph 8.
_FAR_NATS = 4.0


@dataclass(frozen=True)
class RoundingDifference:
    """On random inputs, so it tells a broken graph from a rounded one and nothing about texts.

    Attributes:
        max_abs_error: Largest difference in the first output.
        largest: Largest absolute value that the float graph gives there.
        kl_divergence: KL(float || quantised) of the softmax over the first output's last axis, mean
            over positions, in nats; None where that output is no ``logits``.
    """

    max_abs_error: float
    largest: float
    kl_divergence: float | None

    @property
    def is_far(self) -> bool:
        """Whether the distributions over tokens have little in common."""
        return self.kl_divergence is not None and self.kl_divergence > _FAR_NATS


def rounding_difference(source: Path, result: Path, *, threads: int) -> RoundingDifference:
    """Runs both once, one after the other.

    Args:
        source: The float graph.
        result: The quantised graph.
        threads: For ONNX Runtime.

    Raises:
        QuantizationError: The result gives NaN or infinite numbers where the float graph doesn't.
        BackendError: One of them can't be run.
    """
    model = load_model(source)
    feed = draw(model, cases(model)[0], np.random.default_rng(0))
    name = model.graph.outputs[0].name or ""
    before, after = (_output(path, feed, name, threads) for path in (source, result))
    finite = np.isfinite(before)
    if not finite.any() or not np.isfinite(after[finite]).all():
        raise QuantizationError(
            f"The quantised graph gives numbers in {name} that are not finite.",
            "Take more bits, smaller blocks, or the accuracy level 1.",
        )
    rows = finite.all(axis=-1)
    gap, largest = np.abs(before - after)[finite].max(), np.abs(before[finite]).max()
    kl = _mean_kl(before[rows], after[rows]) if "logits" in name and rows.any() else None
    return RoundingDifference(float(gap), float(largest), kl)


def _output(path: Path, feed: dict[str, Any], name: str, threads: int) -> NDArray[np.float64]:
    with OnnxRuntimeRunner(path, threads=threads, brief=True) as runner:
        return runner.run(feed, [name])[name].astype(np.float64)


def _mean_kl(before: NDArray[np.float64], after: NDArray[np.float64]) -> float:
    no_targets = np.empty(0, np.int64)
    arms = (Distributions(logits, no_targets, "The logits") for logits in (before, after))
    return float(divergence(*arms).mean())
