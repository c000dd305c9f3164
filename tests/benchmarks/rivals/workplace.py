"""What every method is given: the model, one text, and what measures on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.choose.selection.meters import Meter
    from exporter.models.loading.model_source import LoadedModel
    from exporter.models.texts.calibration import CalibrationText
    from exporter.progress import Progress


@dataclass(frozen=True, eq=False)
class Workplace:
    """One model and one text for all."""

    loaded: LoadedModel
    source: str
    text: CalibrationText
    few: CalibrationText
    meter: Meter
    keep: Path
    distill_tokens: int
    progress: Progress

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.loaded.model

    @property
    def num_layers(self) -> int:
        """How many layers it has."""
        return self.loaded.ref.num_layers
