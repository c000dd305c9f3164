"""A training's tensors as the arrays that are kept of it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def moments_of(
    arrays: Mapping[str, NDArray[Any]], name: str, like: torch.Tensor, updates: float
) -> dict[str, torch.Tensor]:
    """What AdamW holds of a tensor; nothing where it was never updated."""
    prefix = f"moments:{name}:"
    held = {key.removeprefix(prefix): value for key, value in arrays.items()
            if key.startswith(prefix)}  # fmt: skip
    if not held:
        return {}
    count = torch.tensor(float(updates))
    return {"step": count, **{key: tensor_like(value, like) for key, value in held.items()}}


def named(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    """Tensors as arrays, each name behind a prefix."""
    return {f"{prefix}:{name}": each.detach().float().cpu().numpy()
            for name, each in tensors.items()}  # fmt: skip


def tensor_like(array: NDArray[Any], like: torch.Tensor) -> torch.Tensor:
    """An array as a tensor of another one's dtype and device.

    Raises:
        ValueError: It has another shape.
    """
    if array.shape != tuple(like.shape):
        raise ValueError(f"{array.shape} is not the shape {tuple(like.shape)}")
    return torch.from_numpy(np.array(array)).to(dtype=like.dtype, device=like.device)
