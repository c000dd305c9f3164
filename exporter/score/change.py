"""What a sublayer makes of the residual stream, as the few numbers a token that metrics need."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from exporter.models.anatomy.residual_stream import LayerStates

if TYPE_CHECKING:
    import torch


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
    """What the attention, the MLP and the whole layer make of the stream."""
    dot = DotProducts()
    return (
        Change(states.entering, states.attended, dot),
        Change(states.mlp_in, states.mlp_out, dot),
        Change(states.entering, states.leaving, dot),
    )


def ratio(length: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """``length / of``; 1 where ``of`` is zero and ``length`` is not, 0 where both are."""
    import torch

    return torch.where(of == 0, (length != 0).double(), length / of)
