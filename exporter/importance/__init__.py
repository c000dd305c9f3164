"""How redundant each attention, MLP and block is: a metric a file, and the text it runs on.

Importing this costs no PyTorch.
"""

from exporter.importance.options import ScoreOptions
from exporter.importance.registry import METRICS
from exporter.importance.scoring import score, score_on
from exporter.texts.calibration import CalibrationText, calibration_text

__all__ = [
    "METRICS",
    "CalibrationText",
    "ScoreOptions",
    "calibration_text",
    "score",
    "score_on",
]
