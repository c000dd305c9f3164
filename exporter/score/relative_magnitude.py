"""How large a sublayer's contribution is in the residual stream that it leaves.

Formula: ``S = mean over tokens of |f(X_t)| / |X_t + f(X_t)|``, that is ``|Y - X| / |Y|``, with
Euclidean lengths along the hidden axis; X and Y as in :mod:`exporter.score.cosine`,
``[batch, tokens, hidden]``.
Range 0 to infinity, no unit; 0: nothing is added, so the sublayer is redundant. Above 1 the
sublayer takes back more than it leaves.
Source: weight subcloning, arXiv 2312.09299, as arXiv 2406.15786v6 compares it with the cosine
(Mistral-7B, 4, 8 and 12 attentions: 67.0, 66.8, 62.3 against the cosine's 67.0, 66.9, 64.8).
Where this differs: ``f`` carries the norm or factor after the sublayer, padding is left out, and
the block's ``f`` is all that its layer adds.
Cost: none beside :mod:`exporter.score.relative_l2`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.score.change import Change, ratio
from exporter.score.metric import StreamMetric

if TYPE_CHECKING:
    import torch


def distance(change: Change) -> torch.Tensor:
    """``|Y - X| / |Y|`` at every token, ``[batch, tokens]``, float64."""
    return ratio(change.norm_of_difference, change.norm_after)


RELATIVE_MAGNITUDE = StreamMetric("relative-magnitude", distance)
