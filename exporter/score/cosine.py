"""The metric of LLM-Drop: one minus the cosine of the residual stream before and after a sublayer.

Formula: ``S = 1 - mean over tokens of cos(X_t, Y_t)`` along the hidden axis, residual included.
Shapes: X and Y ``[batch, tokens, hidden]``, in float32 or wider; padding does not count.
Range 0 to 2, no unit; 0: the sublayer does not turn the stream, so it is redundant.
Source: arXiv 2406.15786v6, equations 1 to 3. Of whole blocks: ShortGPT's block influence, arXiv
2403.03853.

=========  ====================================  =================================
unit       X                                     Y
=========  ====================================  =================================
attention  stream that enters the layer          X plus the attention's contribution
MLP        stream that the MLP adds to           X plus the MLP's contribution
block      stream that enters the layer          stream that leaves the layer
=========  ====================================  =================================

A contribution carries the norm or factor after the sublayer. In a parallel layer both X are the
stream that enters. In a post-norm layer (BERT) Y is the sum *before* the norm that follows it,
since that norm stays when the sublayer goes; the block's Y is what leaves the layer, behind its
last norm.

Where this differs from the paper's code: padding is left out, sums run in float64 instead of
storing activations, and all three units come from one pass. Cost: six dot products a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.score.change import Change
from exporter.score.metric import StreamMetric

if TYPE_CHECKING:
    import torch


def distance(change: Change) -> torch.Tensor:
    """``1 - cos(X, Y)`` at every token, ``[batch, tokens]``, float64."""
    return 1.0 - change.cosine


COSINE = StreamMetric("cosine", distance)
