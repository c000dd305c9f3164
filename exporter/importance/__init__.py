"""How redundant each attention, MLP and block is: a scorer a file, and the text it runs on.

Importing this costs no PyTorch.
"""

from exporter.importance.calibration import CalibrationText, calibration_text
from exporter.importance.scoring import score, score_on

__all__ = ["CalibrationText", "calibration_text", "score", "score_on"]
