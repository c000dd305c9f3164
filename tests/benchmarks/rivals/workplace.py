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
    """One model and one text for all.

    Attributes:
        loaded: The model.
        source: The text that all fit and choose on, as it is named on a command line.
        text: Samples of it, for maps.
        few: The first of them, for means over tokens.
        meter: Measures cuts on fewer still.
        keep: A folder for what an interrupted run has finished.
        distill_tokens: For the rows that train.
        progress: Told what goes on.
    """

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
