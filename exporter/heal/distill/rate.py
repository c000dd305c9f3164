"""How fast a student learns: the highest rate, and its share over the training."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from exporter.artifacts import Train

if TYPE_CHECKING:
    import torch

_HIGHEST = {"adapters": 1e-3, "all": 2e-4}
_TIMES_OF_ENCODERS = 2.0
"""So many times as high, at most, for encoders: all-MiniLM-L6-v2 learned faster so."""
_LOSS_OF_FULL_RATE = 0.2
"""A cut that begins nearer to the whole model's answers, in nats, is trained at a lower rate.

Their divergence grows with the square of the weights' distance, and the rate is how far a step of
Adam goes. SmolLM2-135M without one attention of 30 began at 0.025: 1e-3 led away from there. So did
2e-3 from the 0.04 of a reranker, all-MiniLM-L6-v2 with a random head and without one attention of
6, where 5e-4 and 1e-4 took back 50 and 44 % of the loss.
"""
_LEAST_LOSS = 1e-6
"""What was measured may be nothing, or a little less by rounding, where a cut changes nothing."""
_SHARE_OF_REPLACEMENTS = 0.05
"""Of the rate of adapters: fitted maps are full matrices, and adapters begin at nothing.

all-MiniLM-L6-v2 without attentions 2 and 3 begins at a mean cosine of 0.956 with maps in their
places; with one rate for all the first 9,000 tokens led it down to 0.913, with 0.03 to 0.1 of the
rate for the maps 60,000 tokens led to 0.964.
"""
_WARM_UP = 0.05
"""Share of the training in which the learning rate rises."""


def usual_rate(train: Train, begins: float | None, *, encodes: bool = False) -> float:
    """The highest learning rate.

    Args:
        train: What is trained.
        begins: The divergence from the whole model's answers before the training, in nats, or the
            relative error of single logits; None for embeddings.
        encodes: Whether the model predicts no next token.
    """
    most = _TIMES_OF_ENCODERS if encodes else 1.0
    if begins is None:
        return _HIGHEST[train] * most
    share = math.sqrt(max(begins, _LEAST_LOSS) / _LOSS_OF_FULL_RATE)
    return _HIGHEST[train] * min(most, share)


def rate_share(done: float) -> float:
    """The learning rate's share: a short rise, then half a cosine down to nothing."""
    if done < _WARM_UP:
        return (done + 0.005) / (_WARM_UP + 0.005)
    return 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))


def rate_groups(
    trained: Mapping[str, torch.Tensor], replacing: Collection[str], train: Train
) -> list[dict[str, Any]]:
    """The groups of an optimizer, each with its ``share`` of the learning rate.

    Args:
        trained: All that is trained, by name.
        replacing: The names of what is in the branches' places.
        train: What is trained beside that.
    """
    shares = dict.fromkeys(trained, 1.0)
    if train == "adapters":
        shares |= dict.fromkeys(replacing, _SHARE_OF_REPLACEMENTS)
    return [
        {"params": [trained[name] for name, own in shares.items() if own == share], "share": share}
        for share in sorted(set(shares.values()))
    ]
