"""How far a sublayer moves the residual stream, relative to where it was.

Formula: ``S = mean over tokens of |Y_t - X_t| / |X_t|`` with Euclidean lengths along the hidden
axis; X and Y as in :mod:`exporter.score.cosine`, ``[batch, tokens, hidden]``.
Range 0 to infinity, no unit; 0: nothing is added, so the sublayer is redundant. A token whose X is
zero counts as 1 where something is added to it.
Source: the relative L2 distance among the metrics of arXiv 2407.16286.
Where this differs: attention and MLP are scored as well as blocks; the mean is one of ratios at
each token, so that a few tokens with huge states (the first of a text, in most models) don't rule
it. Unlike the cosine it sees a sublayer that only lengthens the stream.
Cost: a subtraction and a dot product a unit beside the cosine's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.score.change import Change, ratio
from exporter.score.metric import StreamMetric

if TYPE_CHECKING:
    import torch


def distance(change: Change) -> torch.Tensor:
    """``|Y - X| / |X|`` at every token, ``[batch, tokens]``, float64."""
    return ratio(change.norm_of_difference, change.norm_before)


RELATIVE_L2 = StreamMetric("relative-l2", distance)
