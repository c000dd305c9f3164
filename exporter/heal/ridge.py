"""Ridge least squares from sums, the ridge chosen on tokens that were held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.errors import HealingError

if TYPE_CHECKING:
    import torch

_FLOAT64_BYTES = 8


class Sums:
    """Sums over tokens of what a branch reads, x, and what it adds to the stream, y; in float64.

    x: `[inputs]`, sum of x.
    y: `[outputs]`, sum of y.
    xx: `[inputs, inputs]`, sum of x xᵀ.
    xy: `[inputs, outputs]`, sum of x yᵀ.
    yy: `[outputs]`, sum of the squares of y, column by column.
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

        x: `[tokens, inputs]`, of any floating dtype.
        y: `[tokens, outputs]`.
        weights: `[tokens]`, as how many each token counts; None: all as one.
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

        x: the origin of x, `[inputs]`.
        y: the origin of y, `[outputs]`.
        """
        xx = _about(self.xx, (self.x, self.x), (x, x), self.tokens)
        return xx, _about(self.xy, (self.x, self.y), (x, y), self.tokens)

    def y_squares_about(self, y: torch.Tensor) -> float:
        """Sum of the squared length of y, counted from another origin, ``[outputs]``."""
        return self.y_squares - 2 * float(self.y @ y) + self.tokens * float(y @ y)


Two = tuple["torch.Tensor", "torch.Tensor"]


def _about(products: torch.Tensor, sums: Two, origins: Two, tokens: float) -> torch.Tensor:
    """A sum of products, each factor counted from another origin; one matrix is made, no more."""
    result = products.addr(sums[0], origins[1], alpha=-1)
    result.addr_(origins[0], sums[1], alpha=-1)
    return result.addr_(origins[0], origins[1], alpha=tokens)


def sums_bytes(inputs: int, outputs: int) -> int:
    """Memory of one set of sums, without what is as small as a vector."""
    return _FLOAT64_BYTES * inputs * (inputs + outputs)


RIDGES: tuple[float, ...] = tuple(10 ** (step / 2) for step in range(-16, 7))
"""What is tried, relative to the mean eigenvalue: 1e-8 to 1e3."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """``y = weight x + bias``, in float64."""

    weight: torch.Tensor  # `[outputs, inputs]`
    bias: torch.Tensor  # `[outputs]`


@dataclass(frozen=True)
class RidgeChoice:
    """The ridge that does best on held-out tokens."""

    ridge: float
    # share of the held-out tokens' `sum |y|²` that the mean output of the other tokens takes away
    bias_explained: float
    linear_explained: float


def choose_ridge(fitted: Sums, held_out: Sums, ridges: Sequence[float] = RIDGES) -> RidgeChoice:
    """Tries ridges on tokens that the map is not fitted on; one eigendecomposition for all."""
    _check_tokens(fitted)
    _check_tokens(held_out)
    spectrum = _Spectrum(fitted)
    about_bias = held_out.y_squares_about(fitted.y_mean)
    losses = spectrum.held_out_losses(held_out, ridges)
    best = min(range(len(ridges)), key=losses.__getitem__)
    total = held_out.y_squares or 1.0
    return RidgeChoice(ridges[best], 1 - about_bias / total, 1 - losses[best] / total)


def solve(sums: Sums, ridge: float) -> LinearMap:
    """The ridge least-squares map; a ridge is above 0."""
    import torch

    xx, xy = sums.about(sums.x_mean, sums.y_mean)
    xx.diagonal().add_(ridge * _scale(xx))
    weight = torch.cholesky_solve(xy, torch.linalg.cholesky(xx)).T
    return LinearMap(weight, sums.y_mean - weight @ sums.x_mean)


class _Spectrum:
    """The eigenvectors of ``Sxx``, in which a ridge is a division."""

    def __init__(self, sums: Sums) -> None:
        import torch

        self._x_mean, self._y_mean = sums.x_mean, sums.y_mean
        xx, xy = sums.about(self._x_mean, self._y_mean)
        self._scale = _scale(xx)
        values, self._vectors = torch.linalg.eigh(xx)
        self._values = values.clamp(min=0.0)
        self._xy = self._vectors.T @ xy

    def held_out_losses(self, held_out: Sums, ridges: Sequence[float]) -> list[float]:
        """``sum |y - W x - b|²`` over held-out tokens, for each ridge.

        With ``d = 1 / (eigenvalue + λ)`` the loss is a quadratic form in d, so that trying a ridge
        costs no product of matrices.
        """
        import torch

        xx, xy = held_out.about(self._x_mean, self._y_mean)
        linear = torch.linalg.vecdot(self._xy, self._vectors.T @ xy)
        half = self._vectors.T @ xx
        del xx, xy
        square = half @ self._vectors
        del half
        square *= self._xy @ self._xy.T
        constant = held_out.y_squares_about(self._y_mean)
        losses = []
        for ridge in ridges:
            d = 1 / (self._values + ridge * self._scale)
            losses.append(constant - 2 * float(linear @ d) + float(d @ square @ d))
        return losses


def _scale(xx: torch.Tensor) -> float:
    """The mean eigenvalue; 1 where x never changes, so that a ridge still makes W = 0."""
    return float(xx.trace()) / len(xx) or 1.0


def _check_tokens(sums: Sums) -> None:
    if not sums.tokens:
        raise HealingError(
            "There are no tokens to fit a replacement on, or none to judge it on.",
            "Give more to calibrate on (--samples).",
            code="too-few-tokens",
        )
