"""How redundant each attention, MLP and block is: a metric a file, and the text it runs on.

Importing this costs no PyTorch.
"""

from exporter.models.texts.calibration import CalibrationText, calibration_text
from exporter.score.options import ScoreOptions
from exporter.score.registry import METRICS
from exporter.score.scoring import score, score_on

__all__ = [
    "METRICS",
    "CalibrationText",
    "ScoreOptions",
    "calibration_text",
    "score",
    "score_on",
]
