"""Prune&Comp: after each block that goes, the stream is brought back to its magnitude."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from tests.benchmarks.rivals.candidate import WHOLE, Candidate, Patch
from tests.benchmarks.rivals.streams import between_layers, layer_states
from tests.benchmarks.rivals.workplace import Workplace

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
    return Candidate.without_blocks(work.model, patches, patches=patches)


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
