"""LinearPatch: neighbouring blocks go, and one matrix at the gap brings the channels' size back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import hadamard as sylvester

from tests.benchmarks.rivals.candidate import Candidate, Patch
from tests.benchmarks.rivals.streams import between_layers, layer_states, least_turning_span
from tests.benchmarks.rivals.workplace import Workplace

if TYPE_CHECKING:
    import torch


def linear_patch(work: Workplace, dropped: int) -> Candidate:
    """Drops the span that turns the stream least; ``H diag(d) H^T`` stands at the gap."""
    import torch

    first = least_turning_span(work.model, work.few, dropped, last=False)
    width = work.model.config.get_text_config().hidden_size
    rotation = torch.from_numpy(rotation_of(width)).float()
    scales = _scales(work, first, dropped, rotation)
    patch = rotation @ torch.diag(scales) @ rotation.T
    layers = range(first, first + dropped)
    return Candidate.without_blocks(work.model, layers, patches={layers[-1]: Patch(patch)})


def _scales(work: Workplace, first: int, span: int, rotation: torch.Tensor) -> torch.Tensor:
    """``d``, ``[hidden]``."""
    import torch

    found = []
    for states in layer_states(work.model, work.few):
        stream = between_layers(states)
        before, behind = ((stream[n] @ rotation).abs().mean(1) for n in (first, first + span))
        found.append(behind / before)
    return torch.cat(found).mean(0)


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
