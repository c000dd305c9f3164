"""The metric of LLM-Drop: one minus the cosine of the residual stream before and after a sublayer.

Formula: ``S = 1 - mean over tokens of cos(X_t, Y_t)`` along the hidden axis, residual included.
Range 0 to 2, no unit; 0: the sublayer does not turn the stream, so it is redundant.
Source: arXiv 2406.15786v6, equations 1 to 3.

=========  ====================================  =================================
unit       X                                     Y
=========  ====================================  =================================
attention  stream that enters the layer          X plus the attention's contribution
MLP        stream that the MLP adds to           X plus the MLP's contribution
block      stream that enters the layer          stream that leaves the layer
=========  ====================================  =================================

A contribution carries the norm or factor after the sublayer. In a parallel layer both X are the
stream that enters. In a post-norm layer (BERT) Y is the sum *before* the norm that follows it,
since that norm stays when the sublayer goes; the block's Y is what leaves the layer, behind its
last norm.

Where this differs from the paper's code: padding is left out, sums run in float64 instead of
storing activations, and all three units come from one pass. Cost: six dot products a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from exporter.artifacts import DeletionKind, Score
from exporter.errors import ScoringError
from exporter.residual_stream import LayerStates

if TYPE_CHECKING:
    import torch

METRIC = "cosine"
_UNITS: tuple[DeletionKind, ...] = ("attention", "mlp", "block")


class CosineScorer:
    """Collects the metric over many forward passes; its memory doesn't grow with them.

    Use it as the listener of :func:`exporter.residual_stream.tapped`, and announce each batch.

    Args:
        num_layers: How many layers the model has.
    """

    def __init__(self, num_layers: int) -> None:
        import torch

        shape = (len(_UNITS), num_layers)
        self._mask: torch.Tensor | None = None
        self._first_sample = 0
        self._batch: dict[int, torch.Tensor] = {}
        # Per sample i, with d_i the sum of its tokens' distances and n_i their number:
        self._d, self._dd, self._dn = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
        self._n, self._nn, self._samples = 0.0, 0.0, 0

    def begin(self, mask: torch.Tensor) -> None:
        """Announces a batch.

        Args:
            mask: ``[batch, tokens]``, boolean; True for real tokens.
        """
        self._mask = mask
        self._batch = {}

    def __call__(self, states: LayerStates) -> None:
        """Takes one layer's states of the announced batch.

        Raises:
            ScoringError: When an activation is NaN or infinite; names layer and sample.
        """
        import torch

        assert self._mask is not None, "begin() announces each batch"
        sums = [torch.where(self._mask, d, 0.0).sum(dim=1) for d in _distances(states)]
        stacked = torch.stack(sums).cpu()
        if not bool(stacked.isfinite().all()):
            self._refuse(states.number, stacked)
        self._batch[states.number] = stacked

    def end(self) -> None:
        """Takes the announced batch into the running sums."""
        import torch

        assert self._mask is not None, "begin() announces each batch"
        counts = self._mask.sum(dim=1).to(torch.float64).cpu()
        for layer, sums in self._batch.items():
            self._d[:, layer] += sums.sum(dim=1)
            self._dd[:, layer] += (sums * sums).sum(dim=1)
            self._dn[:, layer] += (sums * counts).sum(dim=1)
        self._n += float(counts.sum())
        self._nn += float((counts * counts).sum())
        self._samples += len(counts)
        self._first_sample += len(counts)

    def scores(self) -> list[Score]:
        """The scores so far, layer by layer.

        The standard error is that of a ratio of two sums over samples, so that samples of unequal
        length count by their tokens.

        Raises:
            ScoringError: When there was no token.
        """
        if not self._n:
            raise ScoringError("There is no token to score on.", "Give a longer text.")
        found = []
        for layer in range(self._d.shape[1]):
            for unit, kind in enumerate(_UNITS):
                mean = float(self._d[unit, layer]) / self._n
                found.append(
                    Score(
                        layer=layer,
                        kind=kind,
                        score=mean,
                        std_error=self._std_error(unit, layer, mean),
                    )
                )
        return found

    def _std_error(self, unit: int, layer: int, mean: float) -> float | None:
        if self._samples < 2:
            return None
        squares = float(
            self._dd[unit, layer] - 2 * mean * self._dn[unit, layer] + mean * mean * self._nn
        )
        factor = self._samples / (self._samples - 1)
        return math.sqrt(max(0.0, squares) * factor) / self._n

    def _refuse(self, layer: int, sums: torch.Tensor) -> None:
        unit, row = (~sums.isfinite()).nonzero()[0].tolist()
        raise ScoringError(
            f"The activations around the {_UNITS[unit]} of layer {layer} are not finite in "
            f"sample {self._first_sample + row}.",
            "Load the model in float32, or check its weights.",
        )


def _distances(states: LayerStates) -> Sequence[torch.Tensor]:
    """``1 - cos(X, Y)`` of attention, MLP and block; each ``[batch, tokens]``, float64."""
    import torch

    dots: dict[tuple[int, int], torch.Tensor] = {}

    def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        key = (id(x), id(y))
        if key not in dots:
            dots[key] = torch.linalg.vecdot(x, y).double()
        return dots[key]

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # One product under the root, and sums of the very states: the dot products of x with
        # the contribution would cancel where a layer takes large activations back.
        norms = (dot(x, x) * dot(y, y)).sqrt()
        # A zero state (a padding token's embedding) has no direction: cosine 0, as PyTorch's own.
        return 1.0 - torch.where(norms == 0, 0.0, dot(x, y) / norms)

    return (
        distance(states.entering, states.attended),
        distance(states.mlp_in, states.mlp_out),
        distance(states.entering, states.leaving),
    )
