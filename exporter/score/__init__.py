"""How redundant each attention, MLP and block is: a model and a text to an importance report."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.models.texts.calibration import CalibrationText, calibration_text
    from exporter.score.options import ScoreOptions
    from exporter.score.registry import METRICS
    from exporter.score.scoring import score, score_on

_PLACES = {
    "METRICS": "exporter.score.registry",
    "CalibrationText": "exporter.models.texts.calibration",
    "ScoreOptions": "exporter.score.options",
    "calibration_text": "exporter.models.texts.calibration",
    "score": "exporter.score.scoring",
    "score_on": "exporter.score.scoring",
}

__all__ = [
    "METRICS",
    "CalibrationText",
    "ScoreOptions",
    "calibration_text",
    "score",
    "score_on",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
