"""NBL: the attentions go that a linear map can stand for best, and maps stand in their places."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from exporter.models.ablation.branch_replacements import without_branches
from tests.benchmarks.rivals.candidate import Candidate, Patch
from tests.benchmarks.rivals.streams import layer_states
from tests.benchmarks.rivals.workplace import Workplace

if TYPE_CHECKING:
    import torch

_RIDGE = 1e-9
"""Relative to the mean variance: for directions in which nothing varies."""


def nbl(work: Workplace, dropped: int) -> Candidate:
    """Replaces the attentions of the lowest bound by their linear estimators."""
    found = _estimators(work)
    layers = sorted(range(len(found)), key=lambda layer: found[layer].bound)[:dropped]
    cut = without_branches([(layer, "attention") for layer in layers], work.model)
    return Candidate(cut, patches={layer: found[layer].patch for layer in layers})


class Estimator(NamedTuple):
    """What stands for one attention."""

    bound: float
    patch: Patch


@lru_cache(maxsize=1)
def _estimators(work: Workplace) -> list[Estimator]:
    """Of every attention, by layer."""
    width = work.model.config.get_text_config().hidden_size
    found = [Moments(width) for _ in range(work.num_layers)]
    for states in layer_states(work.model, work.text):
        for moments, each in zip(found, states, strict=True):
            moments.add(each.entering.flatten(0, 1), each.attended.flatten(0, 1))
    return [Estimator(bound(*each.covariances()), each.estimator()) for each in found]


def bound(xx: torch.Tensor, xy: torch.Tensor, yy: torch.Tensor) -> float:
    """The sum of ``1 - rho^2`` over all canonical correlations."""
    import torch

    found = torch.linalg.solve(_firm(yy), xy.T) @ torch.linalg.solve(_firm(xx), xy)
    return float(len(yy) - found.trace())


def _firm(covariance: torch.Tensor) -> torch.Tensor:
    import torch

    size = len(covariance)
    return covariance + _RIDGE * covariance.trace() / size * torch.eye(size).to(covariance)


class Moments:
    """First and second moments of X and Y over tokens."""

    def __init__(self, width: int) -> None:
        import torch

        self._tokens = 0
        self._sum = torch.zeros(2 * width, dtype=torch.float64)
        self._products = torch.zeros(2 * width, 2 * width, dtype=torch.float64)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Takes tokens in, ``[tokens, width]`` both."""
        import torch

        both = torch.cat([x, y], dim=-1).double()
        self._tokens += len(both)
        self._sum += both.sum(0)
        self._products.addmm_(both.T, both)

    def covariances(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of X, of X and Y, of Y."""
        mean = self._sum / self._tokens
        found = self._products / self._tokens - mean.outer(mean)
        width = len(mean) // 2
        return found[:width, :width], found[:width, width:], found[width:, width:]

    def estimator(self) -> Patch:
        """The linear estimator of Y from X, of the least mean squared error."""
        import torch

        xx, xy, _ = self.covariances()
        x_mean, y_mean = (self._sum / self._tokens).chunk(2)
        factor = torch.linalg.solve(_firm(xx), xy)
        return Patch(factor.float(), (y_mean - x_mean @ factor).float())
