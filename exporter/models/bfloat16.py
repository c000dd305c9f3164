"""Where PyTorch runs products in bfloat16."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def bfloat16_where_fast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 for products, where the device has it in hardware; else the model's own dtype."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device))


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device has products of bfloat16 in hardware."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
