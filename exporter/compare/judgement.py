"""What was found of the arms' answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from exporter.artifacts import Accuracy
from exporter.compare.corners import CornerQuality


@dataclass(frozen=True)
class Judgement:
    """The candidate held against the baseline, and all against the whole model in float.

    Attributes:
        accuracy: Of the pair; None where nothing could be judged.
        corners: By arm; empty where no floats stand beside the pair.
    """

    accuracy: Accuracy | None = None
    corners: Mapping[str, CornerQuality] = field(default_factory=dict)
