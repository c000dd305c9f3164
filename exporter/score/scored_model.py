"""What is scored, on what text, and how the passes over it are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from exporter.models.anatomy.residual_stream import LayerModules
from exporter.models.texts.batches import Batch
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import QUIET, Progress


@dataclass(frozen=True)
class ScoredModel:
    """A model with its text.

    Attributes:
        model: A transformers model in eval mode.
        layers: Where its sublayers are.
        text: The samples.
        batch_size: Samples in one forward pass.
        seed: For what is drawn by chance.
        positions: The model's answers are compared at every so many positions.
        blocks: Whether answers are also compared without whole blocks.
        progress: Told what goes on.
    """

    model: Any
    layers: Sequence[LayerModules]
    text: CalibrationText
    batch_size: int = 4
    seed: int = 0
    positions: int = 2
    blocks: bool = False
    progress: Progress = QUIET

    @cached_property
    def batches(self) -> list[Batch]:
        """The text, in its order."""
        return self.text.batches(self.batch_size)
