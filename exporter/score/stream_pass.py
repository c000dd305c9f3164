"""One pass over the text for all metrics of the residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from exporter.artifacts import Score
from exporter.errors import ScoringError
from exporter.models.ablation.ratios import Floats, RatioSums
from exporter.models.anatomy.residual_stream import LayerStates, run_backbone, tapped
from exporter.models.texts.batches import Batch
from exporter.score.metric import UNITS, StreamMetric
from exporter.score.scored_model import ScoredModel
from exporter.score.similarity import changes, cosine

if TYPE_CHECKING:
    import torch

NOT_FINITE_HINT = "Load the model in float32, or check its weights."
ANY_METRIC = StreamMetric("any", cosine)
"""Collected where no metric of the stream is asked for, to see whether activations are finite."""


def stream_scores(scored: ScoredModel, metrics: Sequence[StreamMetric]) -> dict[str, list[Score]]:
    """The scores by each metric's name, all from one pass without head.

    Raises:
        ScoringError: An activation is NaN or infinite (names layer and sample), or there is no
            token.
    """
    sums = StreamSums(len(scored.layers), metrics)
    with scored.progress.task("score", total=len(scored.text.input_ids)) as task:
        for batch in scored.batches:
            sums.add(*stream_sums(scored, metrics, batch))
            task.advance(len(batch.ids))
    return sums.scores()


def stream_sums(
    scored: ScoredModel, metrics: Sequence[StreamMetric], batch: Batch
) -> tuple[Floats, Floats]:
    """One batch's pass without head.

    Returns:
        As :class:`StreamBatch` has them, the sums ``[metrics, layers, units, batch]`` and the
        counts ``[batch]``.

    Raises:
        ScoringError: An activation is NaN or infinite (names layer and sample).
    """
    device = scored.model.device
    collected = StreamBatch(len(scored.layers), metrics, batch.mask_on(device), batch.first_sample)
    with tapped(scored.layers, collected):
        run_backbone(scored.model, batch.inputs(device))
    return collected.sums, collected.counts


def refuse_not_finite(scored: ScoredModel, batches: Iterable[Batch]) -> None:
    """Where logits or gradients are not finite, the stream tells in which layer that began.

    Raises:
        ScoringError: An activation is NaN or infinite (names layer and sample).
    """
    for batch in batches:
        stream_sums(scored, [ANY_METRIC], batch)


class StreamBatch:
    """What each sample of one batch adds to the sums, by metric, layer and unit.

    They can be made anywhere and in any order of layers; batches that are added to
    :class:`StreamSums` in the order of the text give the same scores to the last bit.

    Args:
        num_layers: How many layers the model has.
        metrics: What to collect.
        mask: ``[batch, tokens]``, boolean; True for real tokens.
        first_sample: The number of the batch's first sample in the text, for errors.

    Attributes:
        sums: ``[metrics, layers, units, batch]``.
        counts: How many real tokens each sample has, ``[batch]``.
    """

    def __init__(
        self,
        num_layers: int,
        metrics: Sequence[StreamMetric],
        mask: torch.Tensor,
        first_sample: int = 0,
    ) -> None:
        import torch

        self._metrics, self._mask, self._first_sample = metrics, mask, first_sample
        places = torch.arange(mask.shape[1], device=mask.device)
        self._last = torch.where(mask, places, 0).amax(dim=1, keepdim=True)
        self.sums: Floats = np.zeros((len(metrics), num_layers, len(UNITS), len(mask)))
        self.counts: Floats = mask.sum(dim=1).double().cpu().numpy()

    def __call__(self, states: LayerStates) -> None:
        """Takes one layer's states.

        Raises:
            ScoringError: When an activation is NaN or infinite; names layer and sample.
        """
        import torch

        units = changes(states)
        sums = [[self._reduced(m, m.of(unit)) for unit in units] for m in self._metrics]
        stacked = torch.stack([torch.stack(row) for row in sums]).cpu().numpy()
        if not np.isfinite(stacked).all():
            self._refuse(states.number, stacked)
        self.sums[:, states.number] = stacked

    def _reduced(self, metric: StreamMetric, values: torch.Tensor) -> torch.Tensor:
        """Each sample's sum, last or largest over its real tokens, ``[batch]``; 0 without any."""
        import torch

        mask, last = self._mask.to(values.device), self._last.to(values.device)
        kept = torch.where(mask, values, 0.0)
        if metric.over == "last":
            return kept.gather(1, last)[:, 0]
        if metric.over == "largest":
            largest = torch.where(mask, values, -torch.inf).amax(dim=1)
            return torch.where(mask.any(dim=1), largest, 0.0)
        return kept.sum(dim=1)

    def _refuse(self, layer: int, sums: Floats) -> None:
        _, unit, row = np.argwhere(~np.isfinite(sums))[0]
        raise ScoringError(
            f"The activations around the {UNITS[unit]} of layer {layer} are not finite in "
            f"sample {self._first_sample + row}.",
            NOT_FINITE_HINT,
            code="not-finite",
        )


class StreamSums:
    """The sums of all batches so far.

    Args:
        num_layers: How many layers the model has.
        metrics: What is collected, in the order of the batches' first axis.
    """

    def __init__(self, num_layers: int, metrics: Sequence[StreamMetric]) -> None:
        self._metrics = metrics
        self._sums = [RatioSums((num_layers, len(UNITS))) for _ in metrics]

    def add(self, sums: Floats, counts: Floats) -> None:
        """Takes one batch; the order of the calls decides how the sums round.

        Args:
            sums: ``[metrics, layers, units, batch]``.
            counts: How many real tokens each sample has, ``[batch]``.
        """
        samples = (counts > 0).astype(np.float64)
        for metric, running, batch in zip(self._metrics, self._sums, sums, strict=True):
            running.add(batch, counts if metric.over == "all" else samples)

    def scores(self) -> dict[str, list[Score]]:
        """The scores so far by each metric's name, layer by layer.

        Raises:
            ScoringError: When there was no token.
        """
        found = zip(self._metrics, self._sums, strict=True)
        return {metric.name: scores_of(sums) for metric, sums in found}


def scores_of(sums: RatioSums) -> list[Score]:
    """Scores from sums of the shape ``[layers, units]``, layer by layer.

    Raises:
        ScoringError: When there was no token.
    """
    if not sums.total_weight:
        raise ScoringError(
            "There is no token to score on.", "Give a longer text.", code="no-tokens"
        )
    means, errors = sums.means, sums.std_errors
    return [
        Score(
            layer=layer,
            kind=kind,
            score=float(means[layer, unit]),
            std_error=None if errors is None else float(errors[layer, unit]),
        )
        for layer in range(len(means))
        for unit, kind in enumerate(UNITS)
    ]
