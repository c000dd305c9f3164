"""What `depthcut depths` is asked, as the modules that answer it share it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporter.artifacts import Way
from exporter.choose.costs.request_shape import RequestShape
from exporter.models.ablation.damage import Damage
from exporter.models.ablation.meter import DamageMeter
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import Progress

Place = tuple[Way, int]


@dataclass(frozen=True)
class Judged:
    """A text, and what the whole model makes of it.

    Attributes:
        text: The text.
        meter: Holds cut models against the whole one on it.
        whole: A damage that knows the whole model's losses.
    """

    text: CalibrationText
    meter: DamageMeter
    whole: Damage


@dataclass(frozen=True)
class Question:
    """What is asked, and what it is judged on.

    Attributes:
        loaded: The model.
        judged: The part of the held-out text that a cut is chosen by.
        reported: The other part, which the chosen one is reported on; None where there is none.
        looks: How many figures on the first part a cut is chosen by.
        other_text: The other domain's, as the user names it; None: what the model samples.
        request: What is timed.
        most_increase: The share by which the perplexity may rise.
        own_numbers: Whether the cuts were chosen here; those that no healing can bring within the
            limit are then not healed.
        batch_size: Samples in one forward pass.
        kept: The folder where what is measured is kept for a later call; None keeps nothing.
        progress: Told what goes on.
    """

    loaded: LoadedModel
    judged: Judged
    reported: CalibrationText | None
    looks: int
    other_text: str | None
    request: RequestShape
    most_increase: float
    own_numbers: bool
    batch_size: int
    kept: Path | None
    progress: Progress

    def place(self, name: str) -> Path | None:
        """A file that is kept."""
        return None if self.kept is None else self.kept / name

    def about(self, *texts: CalibrationText) -> dict[str, object]:
        """What figures on some texts depend on."""
        return {**self.loaded.identity(), "ids": [text.ids_sha256 for text in texts]}
