"""Scores of models larger than memory: a layer's weights at a time, the whole text through each.

Importing this costs no PyTorch.
"""

from exporter.score.streaming.scoring import (
    refuse_unstreamable,
    score_streamed,
    score_streamed_on,
)

__all__ = ["refuse_unstreamable", "score_streamed", "score_streamed_on"]
