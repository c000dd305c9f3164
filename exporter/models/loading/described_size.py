"""Holds what a config describes against what the files hold, before memory is asked for."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from exporter.errors import UnsafeModelError
from exporter.models.loading.checkpoint_shards import CheckpointShards

__all__ = ["refuse_far_larger"]

# What isn't in the files is little: a model without some weights is refused later, by name.
_TIMES = 4
_TENSORS_BESIDES, _WEIGHTS_BESIDES = 1 << 10, 1 << 28


def refuse_far_larger(model_class: Any, config: Any, shards: CheckpointShards, path: Path) -> None:
    """Refuses a config of a model many times as large as its files.

    transformers would make the tensors that differ, before it says that they do.

    Args:
        model_class: What the model is going to be loaded as.
        config: The model's, as transformers reads it.
        shards: The model's weights.
        path: Its folder, for errors.

    Raises:
        UnsafeModelError: With both numbers.
    """
    import torch

    held = [math.prod(entry.shape) for entry in shards.entries.values()]
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > _TIMES * len(held) + _TENSORS_BESIDES:
        raise _refused(path, f"{layers} layers", f"{len(held)} tensors")
    make = getattr(model_class, "from_config", None) or model_class._from_config
    with torch.device("meta"):
        described = make(copy.deepcopy(config))
    wanted = [math.prod(part.shape) for part in (*described.parameters(), *described.buffers())]
    many = len(wanted) > _TIMES * len(held) + _TENSORS_BESIDES
    if many or sum(wanted) > _TIMES * sum(held) + _WEIGHTS_BESIDES:
        raise _refused(
            path,
            f"{sum(wanted)} weights in {len(wanted)} tensors",
            f"{sum(held)} in {len(held)}",
        )


def _refused(path: Path, described: str, held: str) -> UnsafeModelError:
    return UnsafeModelError(
        f"{path}: the config describes a model of {described}, and the files hold {held}.",
        "Fetch the model again, or correct its config.",
    )
