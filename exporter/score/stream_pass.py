"""One pass over the text for all metrics of the residual stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from exporter.artifacts import Score
from exporter.artifacts.plans.stacks import DECODER_UNITS
from exporter.errors import ScoringError
from exporter.models.ablation.ratios import Floats, RatioSums
from exporter.models.anatomy.residual_stream import LayerStates, run_backbone, tapped
from exporter.models.texts.batches import Batch
from exporter.score.metric import UNITS, StreamMetric
from exporter.score.scored_model import ScoredModel
from exporter.score.similarity import changes, cosine
from graph_passes.types import DeletionKind

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
    stacks = stacks_of(scored)
    sums = [StreamSums(len(stack.layers), metrics, stack) for stack in stacks]
    with scored.progress.task("score", total=len(scored.text.input_ids), unit="samples") as task:
        for batch in scored.batches:
            for own, found in zip(sums, _stack_sums(scored, stacks, metrics, batch), strict=True):
                own.add(*found)
            task.advance(len(batch.ids))
    parts = [own.scores() for own in sums]
    return {name: [each for part in parts for each in part[name]] for name in parts[0]}


@dataclass(frozen=True)
class ScoredStack:
    """Layers that consist of the same units and see the same tokens.

    Attributes:
        layers: Their numbers, which follow one another.
        units: What of each is scored.
        reads_sources: Whether their stream is that of what the encoder reads.
    """

    layers: range
    units: Sequence[DeletionKind] = UNITS
    reads_sources: bool = False

    def mask(self, batch: Batch) -> torch.Tensor:
        """``[batch, tokens]``, boolean; True for real tokens of its stream."""
        import torch

        if self.reads_sources and batch.sources is not None:
            return torch.from_numpy(batch.sources.mask)
        return batch.mask_on()


def stacks_of(scored: ScoredModel) -> list[ScoredStack]:
    """One for most models; of an encoder-decoder the encoder's and the decoder's."""
    number = len(scored.layers)
    if scored.text.sources is None:
        return [ScoredStack(range(number))]
    encoder = sum(modules.cross_attention is None for modules in scored.layers)
    return [
        ScoredStack(range(encoder), reads_sources=True),
        ScoredStack(range(encoder, number), DECODER_UNITS),
    ]


def stream_sums(
    scored: ScoredModel, metrics: Sequence[StreamMetric], batch: Batch
) -> tuple[Floats, Floats]:
    """One batch's pass without head.

    Returns:
        As :class:`StreamBatch` has them, the sums ``[metrics, layers, units, batch]`` and the
        counts ``[batch]``; of a model of two stacks those of the first.

    Raises:
        ScoringError: An activation is NaN or infinite (names layer and sample).
    """
    return _stack_sums(scored, stacks_of(scored), metrics, batch)[0]


def _stack_sums(
    scored: ScoredModel,
    stacks: Sequence[ScoredStack],
    metrics: Sequence[StreamMetric],
    batch: Batch,
) -> list[tuple[Floats, Floats]]:
    """The same of each stack, all from one pass."""
    device = scored.model.device
    found = [
        StreamBatch(
            len(stack.layers), metrics, stack.mask(batch).to(device), batch.first_sample, stack
        )
        for stack in stacks
    ]
    with contextlib.ExitStack() as tapping:
        for stack, collected in zip(stacks, found, strict=True):
            layers = scored.layers[stack.layers.start : stack.layers.stop]
            tapping.enter_context(tapped(layers, collected))
        run_backbone(scored.model, batch.inputs(device))
    return [(each.sums, each.counts) for each in found]


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
        stack: Which layers; None: all of a model of one stack.

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
        stack: ScoredStack | None = None,
    ) -> None:
        import torch

        self._stack = stack or ScoredStack(range(num_layers))
        self._metrics, self._mask, self._first_sample = metrics, mask, first_sample
        places = torch.arange(mask.shape[1], device=mask.device)
        self._last = torch.where(mask, places, 0).amax(dim=1, keepdim=True)
        self.sums: Floats = np.zeros((len(metrics), num_layers, len(self._stack.units), len(mask)))
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
        self.sums[:, states.number - self._stack.layers.start] = stacked

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
            f"The activations around the {self._stack.units[unit]} of layer {layer} are not "
            "finite in "
            f"sample {self._first_sample + row}.",
            NOT_FINITE_HINT,
            code="not-finite",
        )


class StreamSums:
    """The sums of all batches so far.

    Args:
        num_layers: How many layers the model has.
        metrics: What is collected, in the order of the batches' first axis.
        stack: Which layers; None: all of a model of one stack.
    """

    def __init__(
        self, num_layers: int, metrics: Sequence[StreamMetric], stack: ScoredStack | None = None
    ) -> None:
        self._metrics, self._stack = metrics, stack or ScoredStack(range(num_layers))
        self._sums = [RatioSums((num_layers, len(self._stack.units))) for _ in metrics]

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
        return {metric.name: scores_of(sums, self._stack) for metric, sums in found}


def scores_of(sums: RatioSums, stack: ScoredStack | None = None) -> list[Score]:
    """Scores from sums of the shape ``[layers, units]``, layer by layer.

    Args:
        sums: Of each layer.
        stack: Which layers; None: all of a model of one stack.

    Raises:
        ScoringError: When there was no token.
    """
    if not sums.total_weight:
        raise ScoringError(
            "There is no token to score on.", "Give a longer text.", code="no-tokens"
        )
    means, errors = sums.means, sums.std_errors
    stack = stack or ScoredStack(range(len(means)))
    return [
        Score(
            layer=layer,
            kind=kind,
            score=float(means[row, unit]),
            std_error=None if errors is None else float(errors[row, unit]),
        )
        for row, layer in enumerate(stack.layers)
        for unit, kind in enumerate(stack.units)
    ]
