"""Rivals that put something in the gap: Prune&Comp, LinearPatch, ReplaceMe and NBL."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import hadamard as sylvester

from exporter.heal.fit import Sums
from exporter.models.ablation.branch_replacements import without_branches
from exporter.models.architectures import layer_modules
from tests.benchmarks.rivals.work import (
    WHOLE,
    Candidate,
    Patch,
    Workplace,
    between_layers,
    layer_states,
    least_turning_span,
)

if TYPE_CHECKING:
    import torch


@lru_cache(maxsize=16)
def prune_and_comp(work: Workplace, dropped: int) -> Candidate:
    """Drops block after block by block influence, each judged on the compensated model."""
    if not dropped:
        return WHOLE
    before = prune_and_comp(work, dropped - 1)
    influence, gaps = _of_layers(work, before)
    gone = list(before.patches)
    left = [layer for layer in range(work.num_layers) if layer not in gone]
    layer = min(left, key=lambda number: float(influence[number]))
    patches = {**before.patches, layer: Patch(gaps[layer])}
    read = (len(work.few.input_ids),)
    return Candidate.without_blocks(work.model, patches, patches=patches, read=read)


def _of_layers(work: Workplace, candidate: Candidate) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each layer its block influence and its magnitude gap, ``[layers]``."""
    import torch

    influences, gaps = [], []
    for states in layer_states(work.model, work.few, candidate):
        stream = torch.stack(between_layers(states)).double()
        influence = 1 - torch.cosine_similarity(stream[:-1], stream[1:], dim=-1)
        sizes = stream.abs().mean(2)
        influences.append(influence.flatten(1))
        gaps.append((sizes[1:] / sizes[:-1]).mean(-1))
    return torch.cat(influences, dim=-1).mean(-1), torch.cat(gaps, dim=-1).mean(-1)


def linear_patch(work: Workplace, dropped: int) -> Candidate:
    """Drops the span that turns the stream least; ``H diag(d) H^T`` stands at the gap."""
    import torch

    first = least_turning_span(work.model, work.few, dropped, last=False)
    width = work.model.config.get_text_config().hidden_size
    rotation = torch.from_numpy(rotation_of(width)).float()
    scales = _scales(work, first, dropped, rotation)
    patch = rotation @ torch.diag(scales) @ rotation.T
    layers = range(first, first + dropped)
    patches, read = {layers[-1]: Patch(patch)}, (len(work.few.input_ids),)
    return Candidate.without_blocks(work.model, layers, patches=patches, read=read)


def _scales(work: Workplace, first: int, span: int, rotation: torch.Tensor) -> torch.Tensor:
    """``d``, ``[hidden]``."""
    import torch

    result = []
    for states in layer_states(work.model, work.few):
        stream = between_layers(states)
        before, behind = ((stream[n] @ rotation).abs().mean(1) for n in (first, first + span))
        result.append(behind / before)
    return torch.cat(result).mean(0)


def rotation_of(size: int) -> NDArray[np.float64]:
    """An orthonormal matrix of a Hadamard matrix's signs, ``[size, size]``."""
    signs: NDArray[np.floating[Any]] = np.ones((1, 1))
    while size % 12 == 0:
        signs, size = np.kron(signs, _paley(11)), size // 12
    if size & (size - 1):
        raise ValueError(f"no Hadamard matrix is known here with a factor of {size}")
    signs = np.kron(signs, sylvester(size))
    return np.asarray(signs / np.sqrt(len(signs)), np.float64)


def _paley(prime: int) -> NDArray[np.float64]:
    """Paley's first construction, for a prime that leaves 3 when divided by 4."""
    squares = {n * n % prime for n in range(1, prime)}
    character = np.array([0, *(1 if n in squares else -1 for n in range(1, prime))])
    skew = np.zeros((prime + 1, prime + 1))
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = [[character[(j - i) % prime] for j in range(prime)] for i in range(prime)]
    return np.asarray(skew + np.eye(prime + 1))


_FOLD_RIDGE = 1e-7
"""Relative to the mean eigenvalue: for a system that is as good as singular."""


def replace_me(work: Workplace, dropped: int) -> Candidate:
    """Drops the span that turns the stream least, with a map folded into ``down_proj``."""
    first = least_turning_span(work.model, work.few, dropped)
    change = _map(work, first, dropped)
    name, weight = _down_projection(work, first - 1)
    folded = (change.T @ weight.double()).to(weight.dtype).contiguous()
    layers = range(first, first + dropped)
    read = (len(work.few.input_ids), len(work.text.input_ids))
    return Candidate.without_blocks(work.model, layers, weights={name: folded}, read=read)


def _map(work: Workplace, first: int, span: int) -> torch.Tensor:
    """T, ``[hidden, hidden]``, float64, to be multiplied from the right."""
    import torch

    width = work.model.config.get_text_config().hidden_size
    sums = Sums(width, width)
    for states in layer_states(work.model, work.text):
        before, last = states[first - 1], states[first + span - 1]
        x, y = before.mlp_out - before.mlp_in, last.output - before.mlp_in
        sums.add(x.flatten(0, 1), y.flatten(0, 1))
    ridge = _FOLD_RIDGE * sums.xx.trace() / width
    square = sums.xx + ridge * torch.eye(width).to(sums.xx)
    tensor: torch.Tensor = torch.linalg.solve(square, sums.xy)
    return tensor


def _down_projection(work: Workplace, layer: int) -> tuple[str, torch.Tensor]:
    """The last product of a Llama-like MLP: its weight's name, and ``[hidden, inner]``."""
    mlp: Any = layer_modules(work.model)[layer].mlp
    weight = mlp.down_proj.weight
    names = {id(parameter): name for name, parameter in work.model.named_parameters()}
    return names[id(weight)], weight.data


_RIDGE = 1e-9
"""Relative to the mean variance: for directions in which nothing varies."""


def nbl(work: Workplace, dropped: int) -> Candidate:
    """Replaces the attentions of the lowest bound by their linear estimators."""
    estimators = _estimators(work)
    layers = sorted(range(len(estimators)), key=lambda layer: estimators[layer].bound)[:dropped]
    cut = without_branches([(layer, "attention") for layer in layers], work.model)
    patches = {layer: estimators[layer].patch for layer in layers}
    return Candidate(cut, patches, read=(len(work.text.input_ids),))


class Estimator(NamedTuple):
    """What stands for one attention."""

    bound: float
    patch: Patch


@lru_cache(maxsize=1)
def _estimators(work: Workplace) -> list[Estimator]:
    """Of every attention, by layer."""
    width = work.model.config.get_text_config().hidden_size
    result = [Moments(width) for _ in range(work.num_layers)]
    for states in layer_states(work.model, work.text):
        for moments, state in zip(result, states, strict=True):
            moments.add(state.entering.flatten(0, 1), state.attended.flatten(0, 1))
    return [Estimator(bound(*item.covariances()), item.estimator()) for item in result]


def bound(xx: torch.Tensor, xy: torch.Tensor, yy: torch.Tensor) -> float:
    """The sum of ``1 - rho^2`` over all canonical correlations."""
    import torch

    result = torch.linalg.solve(_firm(yy), xy.T) @ torch.linalg.solve(_firm(xx), xy)
    return float(len(yy) - result.trace())


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
        products = self._products / self._tokens - mean.outer(mean)
        width = len(mean) // 2
        return products[:width, :width], products[:width, width:], products[width:, width:]

    def estimator(self) -> Patch:
        """The linear estimator of Y from X, of the least mean squared error."""
        import torch

        xx, xy, _ = self.covariances()
        x_mean, y_mean = (self._sum / self._tokens).chunk(2)
        factor = torch.linalg.solve(_firm(xx), xy)
        return Patch(factor.float(), (y_mean - x_mean @ factor).float())
