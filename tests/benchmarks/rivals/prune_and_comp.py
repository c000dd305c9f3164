"""Prune&Comp: after each block that goes, the stream is brought back to its length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.benchmarks.rivals.candidate import Candidate
from tests.benchmarks.rivals.streams import between_layers, layer_states
from tests.benchmarks.rivals.workplace import Workplace

if TYPE_CHECKING:
    import torch


def prune_and_comp(work: Workplace, dropped: int) -> Candidate:
    """Drops block after block by block influence, each judged on the compensated model.

    Source: arXiv 2507.18212: the magnitude gap of a removed layer is the mean over tokens of the
    length of its output over that of its input, closed by a factor on the stream before; then the
    importance of what is left is measured again. The paper folds the factor into the embedding
    and all earlier products that write to the stream; here it stands at the gap, which computes
    the same (a norm's epsilon aside), since all that reads the stream before reads it behind a
    norm. The metric is the paper's variant with block influence.
    """
    found = Candidate()
    layers: list[int] = []
    for _ in range(dropped):
        influence, lengthening = _of_layers(work, found)
        left = [layer for layer in range(work.num_layers) if layer not in layers]
        layer = min(left, key=lambda number: float(influence[number]))
        patches = {**found.patches, layer: lengthening[layer]}
        layers.append(layer)
        found = Candidate.without_blocks(work.model, layers, patches=patches)
    return found


def _of_layers(work: Workplace, candidate: Candidate) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each layer its block influence and by how much it lengthens the stream, ``[layers]``."""
    import torch

    found = []
    for states in layer_states(work.model, work.few, candidate):
        stream = torch.stack(between_layers(states)).double().flatten(1, 2)
        before, behind = stream[:-1], stream[1:]
        turned = 1 - torch.cosine_similarity(before, behind, dim=-1)
        found.append(torch.stack([turned, behind.norm(dim=-1) / before.norm(dim=-1)]))
    influence, lengthening = torch.cat(found, dim=-1).mean(-1)
    return influence, lengthening
