"""What a metric is: its name, what it needs, and what it makes its scores from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

if TYPE_CHECKING:
    import torch
    from numpy.random import Generator

    from exporter.models.ablation.damage import Damage
    from exporter.models.residual_stream import LayerStates
    from graph_passes.types import DeletionKind

UNITS: tuple[DeletionKind, ...] = ("attention", "mlp", "block")
"""What of each layer is scored, in the reports' order."""

_M = TypeVar("_M", bound="Metric")


@dataclass(frozen=True)
class Metric:
    """One of three kinds, by how its scores are made."""

    name: str
    reads_text: ClassVar[bool] = True
    needs_head: ClassVar[bool] = False


@dataclass(frozen=True)
class StreamMetric(Metric):
    """Compares the residual stream before and after a sublayer; all of them share one pass."""

    of: Callable[[Change], torch.Tensor]  # the distance at every token, `[batch, tokens]`, float64
    over: Literal["all", "last"] = "all"


@dataclass(frozen=True)
class AnswerMetric(Metric):
    """Compares the model's answers with and without a sublayer; all of them share the runs."""

    needs_head = True
    of: Callable[[Damage], tuple[float, float | None]]


@dataclass(frozen=True)
class OrderMetric(Metric):
    """Looks at neither text nor weights: what the others are held against."""

    reads_text = False
    # from the numbers of layers and of units, and what draws by chance, to `values[layer][unit]`
    of: Callable[[int, int, Generator], list[list[float]]]


def of_kind(metrics: Iterable[Metric], kind: type[_M]) -> list[_M]:
    """The metrics among some that are collected in one way."""
    return [metric for metric in metrics if isinstance(metric, kind)]


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

    x: `[batch, tokens, hidden]`.
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


def kl(damage: Damage) -> tuple[float, float | None]:
    """Mean over positions of ``KL(p || q)``, ``p`` of the whole model, ``q`` without the sublayer.

    Range 0 to infinity, nats; 0: no answer changes. Source: the metric of logits of arXiv
    2407.16286; as a search's fitness, arXiv 2410.14649. Where this differs: no text is judged by
    its labels, so any text will do; every second position is looked at (neighbours tell nearly the
    same, and the head costs a fifth of a small model's run); the layers below the skipped one are
    not run again. Cost: half a forward pass for each sublayer.
    """
    return damage.kl, damage.std_error("kl")


def perplexity(damage: Damage) -> tuple[float, float | None]:
    """Mean over positions of ``NLL without the sublayer - NLL``: log of the ratio of perplexities.

    Range minus to plus infinity, nats; 0: as good without, so the sublayer is redundant; below 0
    the text is predicted better without it. Source: arXiv 2406.10594 (BlockPruner) and the
    perplexity score of Shortened LLaMA. Where this differs: the logarithm of the ratio instead of
    the perplexity itself, which ranks the same and has a standard error over samples. It judges by
    the text's own next words, so noise and domain weigh more than in :func:`kl`, whose runs it
    shares at no cost.
    """
    return damage.log_perplexity_increase, damage.std_error("log_perplexity_increase")
