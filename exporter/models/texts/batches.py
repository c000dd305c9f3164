"""Samples in batches, as a model takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples of a text.

    Attributes:
        number: Of the batch, from 0.
        first_sample: The number of its first sample in the text.
        ids: ``[batch, tokens]``.
        mask: ``[batch, tokens]``; False marks padding.
    """

    number: int
    first_sample: int
    ids: NDArray[np.int64]
    mask: NDArray[np.bool_]

    def trimmed(self) -> Batch:
        """The same without the columns at the end that hold padding alone."""
        width = int(np.flatnonzero(self.mask.any(axis=0)).max(initial=0)) + 1
        return Batch(self.number, self.first_sample, self.ids[:, :width], self.mask[:, :width])

    def ids_on(self, device: torch.device | None = None) -> torch.Tensor:
        """The token ids for PyTorch."""
        import torch

        return torch.from_numpy(self.ids).to(device)

    def mask_on(self, device: torch.device | None = None) -> torch.Tensor:
        """The mask for PyTorch, boolean."""
        import torch

        return torch.from_numpy(self.mask).to(device)

    def inputs(self, device: torch.device | None = None) -> dict[str, torch.Tensor]:
        """What the model is called with."""
        return {"input_ids": self.ids_on(device), "attention_mask": self.mask_on(device).long()}


def batches_of(ids: NDArray[np.int64], mask: NDArray[np.bool_], size: int) -> list[Batch]:
    """A text in its order, ``size`` samples at a time.

    Args:
        ids: ``[samples, tokens]``.
        mask: ``[samples, tokens]``; False marks padding.
        size: Samples in a batch.
    """
    return [
        Batch(number, start, ids[start : start + size], mask[start : start + size])
        for number, start in enumerate(range(0, len(ids), size))
    ]
