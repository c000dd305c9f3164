"""The walk through the layers: weights in, all of the text through them, weights out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifacts import Score
from exporter.models.ablation.meter import refuse_unmeasurable
from exporter.models.anatomy.families import FAMILIES
from exporter.models.anatomy.residual_stream import tapped
from exporter.models.loading.meta_model import MetaModel
from exporter.progress import QUIET, Progress, Task
from exporter.score import CalibrationText
from exporter.score.answer_pass import scores_of_damages
from exporter.score.cosine import COSINE
from exporter.score.metric import AnswerMetric, Metric, StreamMetric
from exporter.score.stream_pass import StreamBatch, StreamSums
from exporter.score.streaming.answers import AnswerCuts
from exporter.score.streaming.batches import Batch, batches_of
from exporter.score.streaming.hidden_states import HiddenStates
from exporter.score.streaming.layer_runner import LayerRunner
from exporter.score.streaming.layout import layers_of
from exporter.score.streaming.parts import Parts, parts_of
from exporter.score.streaming.probing import LayerProbe
from exporter.score.streaming.reading_ahead import filled_in_turn
from exporter.score.streaming.room import room_for_states

if TYPE_CHECKING:
    import torch

_WHOLE = 0
"""The stream of the whole model."""


@dataclass(frozen=True)
class WalkSettings:
    """How the walk is made.

    Attributes:
        batch_size: Samples in one forward pass.
        positions: The model's answers are compared at every so many positions.
        blocks: Whether answers are also compared without whole blocks.
        stream_dir: Where the hidden states are kept in a file; None: in memory where they fit.
        progress: Told what goes on.
    """

    batch_size: int = 4
    positions: int = 2
    blocks: bool = False
    stream_dir: Path | None = None
    progress: Progress = QUIET


class Walk:
    """One walk through a model's layers, for all metrics at once.

    Args:
        meta: The model.
        text: The samples; without any, only the layers' layout is looked at.
        metrics: Those that neither follow gradients nor are fixed count here.
        settings: How it is made.

    Attributes:
        layers: The model's.

    Raises:
        ScoringError: A metric of answers finds nothing to compare in this text.
        UnknownArchitectureError: It is not known where the model keeps its sublayers.
    """

    def __init__(
        self,
        meta: MetaModel,
        text: CalibrationText,
        metrics: Sequence[Metric],
        settings: WalkSettings,
    ) -> None:
        self._meta, self._settings = meta, settings
        self.layers = layers_of(meta)
        self._listening = [metric for metric in metrics if isinstance(metric, StreamMetric)]
        self._answering = [metric for metric in metrics if isinstance(metric, AnswerMetric)]
        self._cuts: AnswerCuts | None = None
        if self._answering:
            refuse_unmeasurable(meta.model, text.mask, settings.positions)
            self._cuts = AnswerCuts(
                meta.model, self.layers, blocks=settings.blocks, positions=settings.positions
            )
        self._batches = batches_of(text, settings.batch_size)
        self._sums = self._new_sums()
        self._runner = LayerRunner(meta.model, self.layers)

    def scores(self) -> dict[str, list[Score]]:
        """Walks, and gives the scores by each metric's name.

        Raises:
            ModelSourceError: A shard can't be read.
            ScoringError: Activations are not finite, or the hidden states find no room.
            UnknownArchitectureError: The layers are not what the table says.
        """
        parts = parts_of(self._meta, self.layers)
        total = len(self._batches) * len(self.layers)
        total += self._cuts.runs(len(self._batches)) if self._cuts else 0
        with (
            contextlib.ExitStack() as stack,
            self._settings.progress.task("score, layer by layer", total=total) as task,
        ):
            for name in parts.rest:
                stack.enter_context(self._meta.held(name))
            states = self._through_layers(parts, stack, task)
            found = self._stream_scores()
            if self._cuts and states:
                for name in parts.head:
                    stack.enter_context(self._meta.held(name))
                found |= self._answer_scores(self._cuts, states, task)
        return found

    def _through_layers(
        self, parts: Parts, stack: contextlib.ExitStack, task: Task
    ) -> HiddenStates | None:
        states: HiddenStates | None = None
        embedding = stack.enter_context(contextlib.ExitStack())
        for name in parts.embedding:
            embedding.enter_context(self._meta.held(name))
        probe = LayerProbe(self._meta.model, self.layers)
        turns = stack.enter_context(contextlib.closing(filled_in_turn(self._meta, parts.layers)))
        for number in turns:
            with self._runner.only(number):
                stream = probe.layer(number, self._runner)
                probe.refuse_so_far(self._meta)  # before the text, which may take hours
                if states is None:
                    states = stack.enter_context(self._room(parts, stream))
                for batch in self._batches:
                    self._batch(number, batch, states, task)
            if not number and not self._needs_embedding(parts):
                embedding.close()
                stack.enter_context(self._runner.without_embedding())
        probe.refuse(self._meta)
        return states

    def _batch(self, number: int, batch: Batch, states: HiddenStates, task: Task) -> None:
        """One batch through one layer, in the whole model and in all cuts that there are."""
        given = states.get(_WHOLE, batch.number) if number else None
        modules, sums = self.layers[number], self._sums[batch.number]
        with contextlib.ExitStack() as stack:
            kept = None
            if self._cuts:
                kept = stack.enter_context(self._cuts.recording(number, batch))
            with tapped([modules], sums):
                output = self._runner.run(batch.inputs, given)
        task.advance()
        if self._cuts and kept:
            self._cuts.advance(number, batch, given, kept, self._runner, states, task)
        states.put(_WHOLE, batch.number, output)

    def _new_sums(self) -> list[StreamBatch]:
        # Metrics of answers alone would not tell in which layer activations become infinite.
        metrics = self._listening or [COSINE]
        return [
            StreamBatch(len(self.layers), metrics, batch.mask_tensor, batch.first_sample)
            for batch in self._batches
        ]

    def _stream_scores(self) -> dict[str, list[Score]]:
        sums = StreamSums(len(self.layers), self._listening)
        for batch in self._sums if self._listening else ():
            sums.add(batch.sums, batch.counts)
        return {metric.name: sums.scores(n) for n, metric in enumerate(self._listening)}

    def _answer_scores(
        self, cuts: AnswerCuts, states: HiddenStates, task: Task
    ) -> dict[str, list[Score]]:
        damages = cuts.damages(self._batches, self._runner, states, task)
        tables = scores_of_damages(self._answering, cuts.units, damages)
        return {m.name: table for m, table in zip(self._answering, tables, strict=True)}

    def _needs_embedding(self, parts: Parts) -> bool:
        """Whether it is wanted once more: as the head, or by layers that nobody has looked at.

        What cuts pictures into patches stays as well: it is small, and no table of tokens.
        """
        known = self._meta.model.config.model_type in FAMILIES
        words = self._meta.model.main_input_name == "input_ids"
        return not known or not words or (self._cuts is not None and bool(parts.tied))

    def _room(
        self, parts: Parts, stream: torch.Tensor
    ) -> contextlib.AbstractContextManager[HiddenStates]:
        """Where the streams go; their width and dtype are the probe's."""
        weights = self._meta.weights
        others = (*parts.rest, *parts.embedding, *parts.head)
        return room_for_states(
            self._settings.stream_dir,
            1 + (len(self._cuts.units) if self._cuts else 0),
            [(*batch.ids.shape, stream.shape[-1]) for batch in self._batches],
            stream.dtype,
            weights_bytes=sum(map(weights.nbytes, others))
            + 2 * max(map(weights.nbytes, parts.layers)),
            progress=self._settings.progress,
        )
