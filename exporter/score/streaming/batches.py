"""The text in batches, as a model takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporter.score import CalibrationText

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples.

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

    @property
    def mask_tensor(self) -> torch.Tensor:
        """The mask for PyTorch."""
        import torch

        return torch.from_numpy(self.mask)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model is called with."""
        import torch

        return {
            "input_ids": torch.from_numpy(self.ids),
            "attention_mask": self.mask_tensor.long(),
        }


def batches_of(text: CalibrationText, size: int) -> list[Batch]:
    """The text in its order, ``size`` samples at a time."""
    return [
        Batch(
            number,
            start,
            text.input_ids[start : start + size],
            text.mask[start : start + size],
        )
        for number, start in enumerate(range(0, len(text.input_ids), size))
    ]
