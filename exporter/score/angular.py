"""The angle by which a sublayer turns the residual stream, over all tokens or at the last one.

Formula: ``S = mean over tokens of arccos(cos(X_t, Y_t)) / pi``; X and Y as in
:mod:`exporter.score.cosine`, ``[batch, tokens, hidden]``. ``angular-last`` takes the last real
token of each sample alone, and its mean over samples.
Range 0 to 1, no unit; 0: the stream is not turned, so the sublayer is redundant; 1: it is turned
round. Beside the cosine it weighs many small turns more than a few large ones.
Source: arXiv 2403.17887, equation 6 (the last token, across a span of whole layers).
Where this differs: a span is one layer, and attention and MLP are scored as well; the paper's own
choice among spans of several layers is not made here.
Rounding: float32 dot products give cosines to about 1e-7, so angles below 1e-4 are rounding. Cost:
nothing beside the cosine, whose dot products it shares.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from exporter.score.change import Change
from exporter.score.metric import StreamMetric

if TYPE_CHECKING:
    import torch


def distance(change: Change) -> torch.Tensor:
    """``arccos(cos(X, Y)) / pi`` at every token, ``[batch, tokens]``, float64."""
    # Rounding may carry the cosine of equal states beyond 1.
    return change.cosine.clamp(-1.0, 1.0).acos() / math.pi


ANGULAR = StreamMetric("angular", distance)
ANGULAR_LAST = StreamMetric("angular-last", distance, last_token=True)
