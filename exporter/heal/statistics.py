"""Sums over tokens from which a branch's replacement is fitted; their size is that of a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_FLOAT64_BYTES = 8


class Sums:
    """Sums over tokens of what a branch reads, x, and what it adds to the stream, y; in float64.

    Args:
        inputs: Width of x.
        outputs: Width of y.
        device: Where the sums are kept; one that knows float64.

    Attributes:
        tokens: How many, or the sum of their weights.
        x: ``[inputs]``, sum of x.
        y: ``[outputs]``, sum of y.
        xx: ``[inputs, inputs]``, sum of x xᵀ.
        xy: ``[inputs, outputs]``, sum of x yᵀ.
        yy: ``[outputs]``, sum of the squares of y, column by column.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        import torch

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.tokens: float = 0
        self.x, self.y, self.yy = zeros(inputs), zeros(outputs), zeros(outputs)
        self.xx, self.xy = zeros(inputs, inputs), zeros(inputs, outputs)

    def add(self, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Takes tokens in.

        Args:
            x: ``[tokens, inputs]``, of any floating dtype.
            y: ``[tokens, outputs]``.
            weights: ``[tokens]``, as how many each token counts; None: all as one.
        """
        x, y = x.to(self.xx), y.to(self.xx)
        weighed = x if weights is None else x * weights.to(self.xx)[:, None]
        counts = x.new_ones(len(x)) if weights is None else weights.to(self.xx)
        self.tokens += len(x) if weights is None else float(weights.sum())
        self.x += weighed.sum(0)
        self.y += counts @ y
        self.xx.addmm_(weighed.T, x)
        self.xy.addmm_(weighed.T, y)
        self.yy += counts @ (y * y)

    def through_origin(self) -> None:
        """Counts every token with its opposite beside it, so that a fit has no bias."""
        self.x, self.y = self.x.new_zeros(len(self.x)), self.y.new_zeros(len(self.y))

    def plus(self, other: Sums) -> Sums:
        """The sums over the tokens of both."""
        total = Sums(len(self.x), len(self.y), self.xx.device)
        total.tokens = self.tokens + other.tokens
        for name in ("x", "y", "yy", "xx", "xy"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def columns(self, columns: slice) -> Sums:
        """The sums for some columns of y; what is of x alone is shared."""
        part = Sums(0, 0)
        part.tokens, part.x, part.xx = self.tokens, self.x, self.xx
        part.y, part.yy, part.xy = self.y[columns], self.yy[columns], self.xy[:, columns]
        return part

    @property
    def y_squares(self) -> float:
        """Sum of the squared length of y."""
        return float(self.yy.sum())

    @property
    def x_mean(self) -> torch.Tensor:
        """``[inputs]``."""
        return self.x / self.tokens

    @property
    def y_mean(self) -> torch.Tensor:
        """``[outputs]``."""
        return self.y / self.tokens

    def about(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``xx`` and ``xy`` with x and y counted from other origins, such as the means.

        Args:
            x: The origin of x, ``[inputs]``.
            y: The origin of y, ``[outputs]``.
        """
        xx = _about(self.xx, (self.x, self.x), (x, x), self.tokens)
        return xx, _about(self.xy, (self.x, self.y), (x, y), self.tokens)

    def y_squares_about(self, y: torch.Tensor) -> float:
        """Sum of the squared length of y, counted from another origin, ``[outputs]``."""
        return self.y_squares - 2 * float(self.y @ y) + self.tokens * float(y @ y)


Two = tuple["torch.Tensor", "torch.Tensor"]


def _about(products: torch.Tensor, sums: Two, origins: Two, tokens: float) -> torch.Tensor:
    """A sum of products, each factor counted from another origin; one matrix is made, no more."""
    found = products.addr(sums[0], origins[1], alpha=-1)
    found.addr_(origins[0], sums[1], alpha=-1)
    return found.addr_(origins[0], origins[1], alpha=tokens)


def sums_bytes(inputs: int, outputs: int) -> int:
    """Memory of one set of sums, without what is as small as a vector."""
    return _FLOAT64_BYTES * inputs * (inputs + outputs)
