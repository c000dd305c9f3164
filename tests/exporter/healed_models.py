"""Random replacements for tiny models, and what is cut with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.replacement_file import Replacements
from graph_passes import ReplacementTensors, SublayerRef

RANK = 5


def planned(*entries: tuple[Any, int, Any]) -> list[PlannedDeletion]:
    """Deletions by kind, layer and replacement."""
    return [PlannedDeletion(kind=k, layer=n, replacement=r) for k, n, r in entries]


def random_replacements(
    hidden: int, deletions: Sequence[PlannedDeletion], *, seed: int = 0, rank: int | None = None
) -> Replacements:
    """Numbers for everything that is replaced; ``rank`` gives linear maps as two factors."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    result = {}
    for deletion in deletions:
        kinds = ("attention", "mlp") if deletion.kind == "block" else (deletion.kind,)
        for kind in kinds if deletion.replacement != "none" else ():
            bias, one = normal(hidden, scale=0.3), hidden**-0.5
            tensors = ReplacementTensors(bias)
            if deletion.replacement == "linear" and rank is None:
                tensors = ReplacementTensors(bias, normal(hidden, hidden, scale=one))
            elif deletion.replacement == "linear" and rank is not None:
                factors = normal(rank, hidden, scale=one), normal(hidden, rank, scale=rank**-0.5)
                tensors = ReplacementTensors(bias, factors=factors)
            result[SublayerRef(deletion.layer, kind)] = tensors
    return Replacements(Path("replacements.safetensors"), "0" * 64, result)


def ids_of(batch: int = 2, tokens: int = 12) -> Any:
    """The same tokens for whoever is asked."""
    import torch

    return torch.randint(1, 120, (batch, tokens), generator=torch.Generator().manual_seed(0))


def answer(model: Any) -> Any:
    """What a model says to them."""
    import torch

    with torch.inference_mode():
        return model(ids_of())[0]
