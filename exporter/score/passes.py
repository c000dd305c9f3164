"""What is scored, on what text, and how the passes over it are made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.artifacts import Score
from exporter.artifacts.stacks import DECODER_UNITS, Stacks
from exporter.errors import ScoringError
from exporter.models.ablation.branch_replacements import without_branches
from exporter.models.ablation.damage import Damage, Floats, RatioSums
from exporter.models.ablation.meter import CutMeter
from exporter.models.residual_stream import LayerModules, LayerStates, run_backbone, tapped
from exporter.models.tasks import Tokens
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.samples import Batch
from exporter.progress import QUIET, Progress
from exporter.score.metric import UNITS, AnswerMetric, StreamMetric, changes, cosine
from graph_passes.types import DeletionKind

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScoredModel:
    """A model with its text."""

    model: Any
    layers: Sequence[LayerModules]
    text: CalibrationText
    batch_size: int = 4
    seed: int = 0
    positions: int = 2
    blocks: bool = False
    progress: Progress = QUIET

    @cached_property
    def batches(self) -> list[Batch]:
        """The text, in its order."""
        return self.text.batches(self.batch_size)


ANY_METRIC = StreamMetric("any", cosine)
"""Collected where no metric of the stream is asked for, to see whether activations are finite."""


def stream_scores(scored: ScoredModel, metrics: Sequence[StreamMetric]) -> dict[str, list[Score]]:
    """The scores by each metric's name, all from one pass without head."""
    stacks = stacks_of(scored)
    sums = [StreamSums(stack, metrics) for stack in stacks]
    with scored.progress.task("score", total=len(scored.text.input_ids), unit="samples") as task:
        for batch in scored.batches:
            for own, item in zip(sums, stream_sums(scored, metrics, batch, stacks), strict=True):
                own.add(*item)
            task.advance(len(batch.ids))
    parts = [own.scores() for own in sums]
    return {name: [score for part in parts for score in part[name]] for name in parts[0]}


@dataclass(frozen=True)
class ScoredStack:
    """Layers that consist of the same units and see the same tokens."""

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
    scored: ScoredModel,
    metrics: Sequence[StreamMetric],
    batch: Batch,
    stacks: Sequence[ScoredStack] = (),  # empty: the first alone
) -> list[tuple[Floats, Floats]]:
    """One batch's pass without head.

    Of each stack, as :class:`StreamBatch` has them, the sums ``[metrics, layers, units, batch]``
    and the counts ``[batch]``.
    """
    device = scored.model.device
    stacks = stacks or stacks_of(scored)[:1]
    batches = [
        StreamBatch(stack, metrics, stack.mask(batch).to(device), batch.first_sample)
        for stack in stacks
    ]
    with contextlib.ExitStack() as tapping:
        for stack, collected in zip(stacks, batches, strict=True):
            layers = scored.layers[stack.layers.start : stack.layers.stop]
            tapping.enter_context(tapped(layers, collected))
        run_backbone(scored.model, batch.inputs(device))
    return [(item.sums, item.counts) for item in batches]


def refuse_not_finite(scored: ScoredModel, batches: Iterable[Batch]) -> None:
    """Where logits are not finite, the stream tells in which layer that began."""
    for batch in batches:
        stream_sums(scored, [ANY_METRIC], batch)


class StreamBatch:
    """What each sample of one batch adds to the sums, by metric, layer and unit.

    They can be made anywhere and in any order of layers; batches that are added to
    :class:`StreamSums` in the order of the text give the same scores to the last bit.
    """

    def __init__(
        self,
        stack: ScoredStack,
        metrics: Sequence[StreamMetric],
        mask: torch.Tensor,  # `[batch, tokens]`, boolean; True for real tokens
        first_sample: int = 0,
    ) -> None:
        import torch

        self._stack, self._metrics = stack, metrics
        self._mask, self._first_sample = mask, first_sample
        places = torch.arange(mask.shape[1], device=mask.device)
        self._last = torch.where(mask, places, 0).amax(dim=1, keepdim=True)
        # `[metrics, layers, units, batch]`
        self.sums: Floats = np.zeros((len(metrics), len(stack.layers), len(stack.units), len(mask)))
        # how many real tokens each sample has, `[batch]`
        self.counts: Floats = mask.sum(dim=1).double().cpu().numpy()

    def __call__(self, states: LayerStates) -> None:
        """Takes one layer's states."""
        import torch

        units = changes(states)
        sums = [[self._reduced(m, m.of(unit)) for unit in units] for m in self._metrics]
        stacked = torch.stack([torch.stack(row) for row in sums]).cpu().numpy()
        if not np.isfinite(stacked).all():
            _, unit, row = np.argwhere(~np.isfinite(stacked))[0]
            raise ScoringError(
                f"The activations around the {self._stack.units[unit]} of layer {states.number} "
                f"are not finite in sample {self._first_sample + row}.",
                "Load the model in float32, or check its weights.",
                code="not-finite",
            )
        self.sums[:, states.number - self._stack.layers.start] = stacked

    def _reduced(self, metric: StreamMetric, values: torch.Tensor) -> torch.Tensor:
        """Each sample's sum or last over its real tokens, ``[batch]``; 0 without any."""
        import torch

        mask, last = self._mask.to(values.device), self._last.to(values.device)
        kept = torch.where(mask, values, 0.0)
        if metric.over == "last":
            return kept.gather(1, last)[:, 0]
        return kept.sum(dim=1)


class StreamSums:
    """The sums of all batches so far."""

    def __init__(self, stack: ScoredStack, metrics: Sequence[StreamMetric]) -> None:
        self._stack, self._metrics = stack, metrics
        self._sums = [RatioSums((len(stack.layers), len(stack.units))) for _ in metrics]

    def add(self, sums: Floats, counts: Floats) -> None:
        """Takes one batch; the order of the calls decides how the sums round.

        sums: `[metrics, layers, units, batch]`.
        counts: how many real tokens each sample has, `[batch]`.
        """
        samples = (counts > 0).astype(np.float64)
        for metric, running, batch in zip(self._metrics, self._sums, sums, strict=True):
            running.add(batch, counts if metric.over == "all" else samples)

    def scores(self) -> dict[str, list[Score]]:
        """The scores so far by each metric's name, layer by layer."""
        pairs = zip(self._metrics, self._sums, strict=True)
        return {metric.name: scores_of(sums, self._stack) for metric, sums in pairs}


def scores_of(sums: RatioSums, stack: ScoredStack) -> list[Score]:
    """Scores from sums of the shape ``[layers, units]``, layer by layer."""
    if not sums.total_weight:
        raise ScoringError(
            "There is no token to score on.", "Give a longer text.", code="no-tokens"
        )
    means, errors = sums.means, sums.std_errors
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


def answer_scores(scored: ScoredModel, metrics: Sequence[AnswerMetric]) -> dict[str, list[Score]]:
    """The scores by each metric's name; every sublayer is skipped once.

    Whole blocks are skipped only where that is asked for: half as much work again.
    """
    units = answer_units(len(scored.layers), blocks=scored.blocks)
    if scored.text.sources is not None:
        stacks = Stacks.of(scored.model.config)
        kinds = stacks.units if scored.blocks else stacks.kinds
        units = [(layer, kind) for layer in range(stacks.layers) for kind in kinds(layer)]
    cuts = [without_branches([unit], scored.model) for unit in units]
    _, *damages = answer_meter(scored).measure_many({}, cuts, scored.progress)
    return scores_of_damages(metrics, units, damages)


def answer_meter(scored: ScoredModel) -> CutMeter[Damage]:
    """What runs the model's text; it keeps nothing between calls."""
    return Tokens.of(scored.model).meter(
        scored.text.input_ids,
        scored.text.mask,
        batch_size=scored.batch_size,
        positions=scored.positions,
        kept_bytes=0,
        sources=scored.text.sources,
    )


def answer_units(num_layers: int, *, blocks: bool) -> list[tuple[int, DeletionKind]]:
    """What is skipped, each alone, in the order of the scores."""
    kinds = UNITS if blocks else UNITS[:2]
    return [(layer, kind) for layer in range(num_layers) for kind in kinds]


def scores_of_damages(
    metrics: Sequence[AnswerMetric],
    units: Sequence[tuple[int, DeletionKind]],
    damages: Sequence[Damage],
) -> dict[str, list[Score]]:
    """The scores by each metric's name."""
    scores: dict[str, list[Score]] = {}
    for metric in metrics:
        judged = [(*unit, *metric.of(damage)) for unit, damage in zip(units, damages, strict=True)]
        scores[metric.name] = [
            Score(layer=layer, kind=kind, score=value, std_error=error)
            for layer, kind, value, error in judged
        ]
    return scores
