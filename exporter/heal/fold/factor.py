"""The map that a product's weight is changed by, and the factor of the stream before the gap.

With u what the product reads, x the healed model's stream behind it and t the whole model's behind
the gap, ``W`` and ``a`` minimise ``sum |t - a x - W u|²``. The maps of ``t - x`` and of ``x`` from
u have one ridge, so a is the least-squares factor of what they leave; the map is the first less
``a - 1`` times the second.
Source: Prune&Comp (arXiv 2507.18212) takes the mean ratio of magnitudes for a; the fit is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from exporter.heal.ridge import LinearMap, choose_ridge, lost, solve
from exporter.heal.statistics import Sums

_FACTORS = 0.5, 2.0
"""A stream is multiplied by no less and no more."""


def fitted_map(first: Sums, later: Sums, ridges: Sequence[float]) -> LinearMap | None:
    """The map on the tokens of both; None where it would take nothing away on ``later``."""
    choice = choose_ridge(first, later, ridges)
    if choice.linear_explained <= 0:
        return None
    return solve(first.plus(later), choice.ridge)


def map_and_factor(
    first: Sums, later: Sums, ridges: Sequence[float]
) -> tuple[LinearMap | None, float]:
    """The map, and the factor: 1 where another would take nothing more away on ``later``.

    Args:
        first: Sums over the tokens to fit on, to ``t - x``, ``x`` and ``t`` side by side.
        later: The same over held-out tokens.
        ridges: What to try.
    """
    choice = choose_ridge(_third(first, 0), _third(later, 0), ridges)
    if choice.linear_explained <= 0:
        return None, 1.0
    change = _factor(first, later, choice.ridge) - 1
    maps = solve(first.plus(later), choice.ridge)
    lacking, stream = _rows(maps, 0), _rows(maps, 1)
    weight = lacking.weight - change * stream.weight
    return LinearMap(weight, lacking.bias - change * stream.bias), 1 + change


def _factor(first: Sums, later: Sums, ridge: float) -> float:
    maps = solve(first, ridge)
    cross, square = _products(first, maps)
    low, high = _FACTORS
    change = min(max(cross / square, low - 1), high - 1) if square > 0 else 0.0
    cross, square = _products(later, maps)
    gains = 2 * change * cross > change**2 * square
    return 1 + change if gains else 1.0


def _products(sums: Sums, maps: LinearMap) -> tuple[float, float]:
    """What the maps leave of ``t - x`` times what they leave of ``x``, and the latter's square."""
    lacking, stream, wanted = (lost(_third(sums, n), _rows(maps, n)) for n in range(3))
    return (wanted - lacking - stream) / 2, stream


def _third(sums: Sums, number: int) -> Sums:
    return sums.columns(_part(len(sums.y) // 3, number))


def _rows(maps: LinearMap, number: int) -> LinearMap:
    part = _part(len(maps.bias) // 3, number)
    return LinearMap(maps.weight[part], maps.bias[part])


def _part(width: int, number: int) -> slice:
    return slice(number * width, (number + 1) * width)
