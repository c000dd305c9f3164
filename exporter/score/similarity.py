"""Metrics of the residual stream: how far a sublayer moves it from X, before, to Y, after.

X and Y are ``[batch, tokens, hidden]``, in float32 or wider; a metric gives a value at every token,
of which the score is the mean, or what ``over`` says in :mod:`exporter.score.registry`; padding is
left out. 0: the sublayer doesn't move the stream, so it is redundant.

=========  ====================================  =================================
unit       X                                     Y
=========  ====================================  =================================
attention  stream that enters the layer          X plus the attention's contribution
cross-     stream that it adds to                X plus its contribution
attention
MLP        stream that the MLP adds to           X plus the MLP's contribution
block      stream that enters the layer          stream that leaves the layer
=========  ====================================  =================================

A contribution carries the norm or factor after the sublayer. In a parallel layer both X are the
stream that enters. In a post-norm layer (BERT) Y is the sum *before* the norm that follows it,
since that norm stays when the sublayer goes; the block's Y is what leaves the layer, behind its
last norm. All units come from one pass, and their sums run in float64.

A new metric: a function from a :class:`Change` to ``[batch, tokens]``, float64, here, and a line in
:mod:`exporter.score.registry`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from exporter.models.anatomy.residual_stream import LayerStates


def cosine(change: Change) -> torch.Tensor:
    """``1 - cos(X, Y)``, the metric of LLM-Drop: 0 to 2, no unit.

    Source: arXiv 2406.15786v6, equations 1 to 3; of whole blocks ShortGPT's block influence, arXiv
    2403.03853. Cost: six dot products a layer.
    """
    return 1.0 - change.cosine


def angular(change: Change) -> torch.Tensor:
    """``arccos(cos(X, Y)) / pi``, the angle by which the stream is turned: 0 to 1, no unit.

    Beside the cosine it weighs many small turns more than a few large ones. Source: arXiv
    2403.17887, equation 6 (the last token, across a span of whole layers). Where this differs: a
    span is one layer, and attention and MLP are scored as well. Rounding: float32 dot products give
    cosines to about 1e-7, so angles below 1e-4 are rounding.
    """
    # Rounding may carry the cosine of equal states beyond 1.
    return change.cosine.clamp(-1.0, 1.0).acos() / math.pi


def relative_l2(change: Change) -> torch.Tensor:
    """``|Y - X| / |X|``, how far the stream is moved: 0 to infinity, no unit.

    A token whose X is zero counts as 1 where something is added to it. Source: the relative L2
    distance among the metrics of arXiv 2407.16286. Where this differs: the mean is one of ratios at
    each token, so that a few tokens with huge states (the first of a text, in most models) don't
    rule it. Unlike the cosine it sees a sublayer that only lengthens the stream.
    """
    return ratio(change.norm_of_difference, change.norm_before)


def relative_magnitude(change: Change) -> torch.Tensor:
    """``|Y - X| / |Y|``, how large the contribution is in what leaves: 0 to infinity, no unit.

    Above 1 the sublayer takes back more than it leaves. Source: weight subcloning, arXiv
    2312.09299, as arXiv 2406.15786v6 compares it with the cosine (Mistral-7B, 4, 8 and 12
    attentions: 67.0, 66.8, 62.3 against the cosine's 67.0, 66.9, 64.8).
    """
    return ratio(change.norm_of_difference, change.norm_after)


class DotProducts:
    """Dot products along the hidden axis; each pair of the same objects is computed once.

    They are sums of the very states: those of X with the contribution would cancel where a layer
    takes large activations back.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens]``, float64, of two states ``[batch, tokens, hidden]``."""
        import torch

        key = (id(x), id(y))
        if key not in self._known:
            self._known[key] = torch.linalg.vecdot(x, y).double()
        return self._known[key]


class Change:
    """From X, the stream before a sublayer, to Y, the stream after it.

    All properties are ``[batch, tokens]``, float64, and computed when first asked for.

    Args:
        x: ``[batch, tokens, hidden]``.
        y: The same.
        dot: Shared among the changes of one layer, whose states are the same objects.
    """

    def __init__(self, x: torch.Tensor, y: torch.Tensor, dot: DotProducts) -> None:
        self._x, self._y, self._dot = x, y, dot

    @cached_property
    def cosine(self) -> torch.Tensor:
        """Of the angle between X and Y; 0 where one of them is zero, as PyTorch has it."""
        import torch

        # One product under the root, since norms of their own would round twice.
        norms = (self._dot(self._x, self._x) * self._dot(self._y, self._y)).sqrt()
        return torch.where(norms == 0, 0.0, self._dot(self._x, self._y) / norms)

    @cached_property
    def norm_before(self) -> torch.Tensor:
        """Length of X."""
        return self._dot(self._x, self._x).sqrt()

    @cached_property
    def norm_after(self) -> torch.Tensor:
        """Length of Y."""
        return self._dot(self._y, self._y).sqrt()

    @cached_property
    def norm_of_difference(self) -> torch.Tensor:
        """Length of ``Y - X``; of the difference itself, since dot products would cancel."""
        import torch

        difference = self._y - self._x
        squares: torch.Tensor = torch.linalg.vecdot(difference, difference).double()
        return squares.sqrt()


def changes(states: LayerStates) -> Sequence[Change]:
    """What the attention, the MLP and the whole layer make of the stream.

    In the decoder of an encoder-decoder, its cross-attention too, between the first two.
    """
    dot = DotProducts()
    cross: Sequence[Change] = ()
    if states.crossing is not None and states.crossed is not None:
        cross = (Change(states.crossing, states.crossed, dot),)
    return (
        Change(states.entering, states.attended, dot),
        *cross,
        Change(states.mlp_in, states.mlp_out, dot),
        Change(states.entering, states.leaving, dot),
    )


def ratio(length: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """``length / of``; 1 where ``of`` is zero and ``length`` is not, 0 where both are."""
    import torch

    return torch.where(of == 0, (length != 0).double(), length / of)
