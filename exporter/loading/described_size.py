"""Holds what a config describes against what the files hold, before memory is asked for."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from exporter.errors import UnsafeModelError
from exporter.loading.checkpoint_shards import CheckpointShards

__all__ = ["refuse_far_larger"]

# Of weights that aren't in the files there are few; a model without some is refused later, by name.
_TIMES, _BESIDES = 4, 1 << 28


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

    make = getattr(model_class, "from_config", None) or model_class._from_config
    with torch.device("meta"):
        described = make(copy.deepcopy(config))
    wanted = sum(math.prod(part.shape) for part in (*described.parameters(), *described.buffers()))
    held = sum(math.prod(entry.shape) for entry in shards.entries.values())
    if wanted > _TIMES * held + _BESIDES:
        raise UnsafeModelError(
            f"{path}: the config describes a model of {wanted} weights, and the files hold {held}.",
            "Fetch the model again, or correct its config.",
        )
