"""Ridge least squares from sums, the ridge chosen on tokens that were held out.

Formula: ``W, b`` that minimise ``sum |y - W x - b|² + λ |W|²`` over tokens; with ``Sxx``, ``Sxy``
the sums about the means, ``Wᵀ = (Sxx + λ)⁻¹ Sxy`` and ``b = mean y - W mean x``. The ridge is given
relative to the mean eigenvalue of ``Sxx``, so it means the same for any number of tokens:
``λ = ridge · trace(Sxx) / inputs``. At 0 it is plain least squares; with a growing ridge W goes to
0 and b to the mean output.
Source: arXiv 2505.21077 (NBL) replaces attentions by their linear least squares; the ridge, the
held-out choice and the streamed sums are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.errors import HealingError
from exporter.heal.statistics import Sums

if TYPE_CHECKING:
    import torch

RIDGES: tuple[float, ...] = tuple(10 ** (step / 2) for step in range(-16, 7))
"""What is tried, relative to the mean eigenvalue: 1e-8 to 1e3."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """``y = weight x + bias``, in float64.

    Attributes:
        weight: ``[outputs, inputs]``.
        bias: ``[outputs]``.
    """

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class RidgeChoice:
    """The ridge that does best on held-out tokens.

    Attributes:
        ridge: Relative to the mean eigenvalue.
        bias_explained: Share of the held-out tokens' ``sum |y|²`` that the mean output of the
            other tokens takes away; at most 1, negative where it does harm.
        linear_explained: The same for the linear map at ``ridge``.
    """

    ridge: float
    bias_explained: float
    linear_explained: float


def choose_ridge(fitted: Sums, held_out: Sums, ridges: Sequence[float] = RIDGES) -> RidgeChoice:
    """Tries ridges on tokens that the map is not fitted on; one eigendecomposition for all.

    Args:
        fitted: Sums over the tokens to fit on.
        held_out: Sums over the tokens to judge on.
        ridges: What to try.

    Raises:
        HealingError: When either has no token.
    """
    _check_tokens(fitted)
    _check_tokens(held_out)
    spectrum = _Spectrum(fitted)
    about_bias = held_out.y_squares_about(fitted.y_mean)
    losses = spectrum.held_out_losses(held_out, ridges)
    best = min(range(len(ridges)), key=losses.__getitem__)
    total = held_out.y_squares or 1.0
    return RidgeChoice(ridges[best], 1 - about_bias / total, 1 - losses[best] / total)


def solve(sums: Sums, ridge: float) -> LinearMap:
    """The ridge least-squares map.

    Args:
        sums: Over the tokens to fit on.
        ridge: Relative to the mean eigenvalue; 0 for plain least squares.

    Raises:
        HealingError: When there is no token, or without a ridge no unique map.
    """
    import torch

    _check_tokens(sums)
    xx, xy = regularised(sums, ridge)
    factor, failed = torch.linalg.cholesky_ex(xx)
    if int(failed) or (ridge == 0 and _is_singular(factor)):
        raise HealingError(
            f"{sums.tokens} tokens do not settle a linear map of {len(sums.x)} inputs.",
            "Give more to calibrate on (--samples), or a ridge above 0.",
            code="map-not-settled",
        )
    weight = torch.cholesky_solve(xy, factor).T
    return LinearMap(weight, sums.y_mean - weight @ sums.x_mean)


def regularised(sums: Sums, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``Sxx + λ`` and ``Sxy``, about the means."""
    xx, xy = sums.about(sums.x_mean, sums.y_mean)
    xx.diagonal().add_(ridge * _scale(xx))
    return xx, xy


def lost(sums: Sums, found: LinearMap) -> float:
    """``sum |y - W x - b|²`` over some tokens."""
    xx, xy = sums.about(sums.x * 0, found.bias)
    weight = found.weight
    cross = float((weight.T * xy).sum())
    return sums.y_squares_about(found.bias) - 2 * cross + float((weight @ xx * weight).sum())


def explained(sums: Sums, found: LinearMap) -> float:
    """Share of ``sum |y|²`` over some tokens that a map takes away; at most 1."""
    return 1 - lost(sums, found) / (sums.y_squares or 1.0)


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


def _is_singular(factor: torch.Tensor) -> bool:
    pivots = factor.diagonal()
    return float(pivots.min()) < 1e-7 * float(pivots.max())


def _check_tokens(sums: Sums) -> None:
    if not sums.tokens:
        raise HealingError(
            "There are no tokens to fit a replacement on, or none to judge it on.",
            "Give more to calibrate on (--samples).",
            code="no-tokens",
        )
