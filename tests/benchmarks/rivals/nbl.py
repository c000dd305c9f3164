"""NBL: the attentions go that a linear map can stand for best, and maps stand in their places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exporter.heal.activations import observing
from exporter.heal.fit import fit_branches
from exporter.models.anatomy.architectures import sublayers
from exporter.models.anatomy.residual_stream import run_backbone
from exporter.models.texts.batches import batches_of
from graph_passes.types import SublayerRef
from tests.benchmarks.rivals.candidate import Candidate
from tests.benchmarks.rivals.streams import BATCH
from tests.benchmarks.rivals.workplace import Workplace

if TYPE_CHECKING:
    import torch

_RIDGE = 1e-9
"""Relative to the mean variance: for directions in which nothing varies."""


def nbl(work: Workplace, dropped: int) -> Candidate:
    """Replaces the attentions of the lowest bound by their linear estimators.

    Source: arXiv 2505.21077, its theorem on the error of the linear estimator (the bound is the sum
    of ``1 - rho^2`` over the canonical correlations of X, what the attention reads, and X plus what
    it gives) and its closed form of the map. Where this differs: the map has the ridge that
    depthcut chooses on held-out tokens, which does it no harm.
    """
    bounds = {name: bound(*moments.covariances()) for name, moments in _moments(work).items()}
    names = sorted(bounds, key=lambda name: bounds[name])[:dropped]
    fits = fit_branches(work.loaded, work.text, names, batch_size=BATCH)
    return Candidate({name: fits[name].linear for name in names})


def bound(xx: torch.Tensor, xy: torch.Tensor, yy: torch.Tensor) -> float:
    """The sum of ``1 - rho^2`` over all canonical correlations.

    The squares of these are the eigenvalues of ``yy^-1 yx xx^-1 xy``, so their sum is its trace.

    Args:
        xx: Covariance of X, ``[width, width]``.
        xy: Of X and Y.
        yy: Of Y.
    """
    import torch

    found = torch.linalg.solve(_firm(yy), xy.T) @ torch.linalg.solve(_firm(xx), xy)
    return float(len(yy) - found.trace())


def _firm(covariance: torch.Tensor) -> torch.Tensor:
    import torch

    size = len(covariance)
    return covariance + _RIDGE * covariance.trace() / size * torch.eye(size).to(covariance)


class Moments:
    """First and second moments of X and of X plus what the branch gives, over tokens."""

    def __init__(self, width: int) -> None:
        import torch

        self._tokens = 0
        self._sum = torch.zeros(2 * width, dtype=torch.float64)
        self._products = torch.zeros(2 * width, 2 * width, dtype=torch.float64)

    def add(self, x: torch.Tensor, given: torch.Tensor) -> None:
        """Takes tokens in, ``[tokens, width]`` both."""
        import torch

        both = torch.cat([x, x + given], dim=-1).double()
        self._tokens += len(both)
        self._sum += both.sum(0)
        self._products.addmm_(both.T, both)

    def covariances(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of X, of X and Y, of Y."""
        mean = self._sum / self._tokens
        found = self._products / self._tokens - mean.outer(mean)
        width = len(mean) // 2
        return found[:width, :width], found[:width, width:], found[width:, width:]


def _moments(work: Workplace) -> dict[SublayerRef, Moments]:
    """Of every attention."""
    parts = [part for part in sublayers(work.model) if part.kind == "attention"]
    width = work.model.config.get_text_config().hidden_size
    found = {part.ref: Moments(width) for part in parts}

    def add(part: Any, x: torch.Tensor, y: torch.Tensor) -> None:
        found[part.ref].add(x.flatten(0, 1), y.flatten(0, 1))

    for batch in batches_of(work.text.input_ids, work.text.mask, BATCH):
        with observing(parts, batch.ids.shape, add):
            run_backbone(work.model, batch.inputs(work.model.device))
    return found
