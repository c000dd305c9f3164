"""Reduced-rank regression: the map of a given rank whose *outputs* are the nearest.

Cutting the singular values of W alone ignores how often and how strongly each input direction is
met. With the ridge written as further rows, ``X' = [X; √λ]`` and ``Y' = [Y; 0]``, the best map of
rank r projects the full map's outputs on their r strongest directions: ``W_r = U Uᵀ W`` with U the
first r eigenvectors of ``W (Sxx + λ) Wᵀ``.
Source: Izenman 1975, "Reduced-rank regression for the multivariate linear model".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.errors import HealingError
from exporter.heal.ridge import LinearMap, regularised
from exporter.heal.statistics import Sums

if TYPE_CHECKING:
    import torch


def factors(
    found: LinearMap, sums: Sums, ridge: float, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A map's two factors of the given rank.

    Args:
        found: The map of full rank, as fitted on ``sums`` with ``ridge``.
        sums: What it was fitted on.
        ridge: What it was fitted with.
        rank: At least 1, at most the map's width.

    Returns:
        ``down`` ``[rank, inputs]`` and ``up`` ``[outputs, rank]``: the map is ``up @ down``.

    Raises:
        HealingError: When there is no such rank.
    """
    import torch

    most = min(found.weight.shape)
    if not 1 <= rank <= most:
        raise HealingError(
            f"There is no map of rank {rank} here.",
            f"Ask for a rank from 1 to {most}.",
            code="rank-out-of-range",
        )
    xx, _ = regularised(sums, ridge)
    _, vectors = torch.linalg.eigh(found.weight @ xx @ found.weight.T)
    up = vectors[:, -rank:]
    return up.T @ found.weight, up


def product(down: torch.Tensor, up: torch.Tensor, sums: Sums) -> LinearMap:
    """The map that two factors make, with the bias that makes its mean output right."""
    weight = up @ down
    return LinearMap(weight, sums.y_mean - weight @ sums.x_mean)
