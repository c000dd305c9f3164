"""The walk through the layers: weights in, all of the text through them, weights out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifacts import Score
from exporter.models.ablation.layer_runner import LayerRunner
from exporter.models.ablation.meter import refuse_unmeasurable
from exporter.models.anatomy.architectures import refuse_differing
from exporter.models.anatomy.families import FAMILIES
from exporter.models.anatomy.residual_stream import ProbeFindings, probe_inputs, tapped
from exporter.models.loading.meta_model import MetaModel
from exporter.models.texts.batches import Batch
from exporter.progress import Task
from exporter.score.answer_pass import scores_of_damages
from exporter.score.metric import AnswerMetric, Metric, StreamMetric, of_kind
from exporter.score.scored_model import ScoredModel
from exporter.score.stream_pass import ANY_METRIC, StreamBatch, StreamSums
from exporter.score.streaming.answers import AnswerCuts
from exporter.score.streaming.hidden_states import HiddenStates, room_for_states
from exporter.score.streaming.parts import Parts, filled_in_turn, parts_of

if TYPE_CHECKING:
    import torch

_WHOLE = 0
"""The stream of the whole model."""


def layer_by_layer_scores(
    meta: MetaModel, scored: ScoredModel, metrics: Sequence[Metric], stream_dir: Path | None
) -> dict[str, list[Score]]:
    """The scores by the names of the metrics of stream and answers; others are left out.

    Args:
        meta: The model.
        scored: The same with its text.
        metrics: What is collected, all at once.
        stream_dir: Where the hidden states are kept in a file; None: in memory where they fit.

    Raises:
        ModelSourceError: A shard can't be read.
        ScoringError: A metric of answers finds nothing to compare in this text, activations are not
            finite, or the hidden states find no room.
        UnknownArchitectureError: The layers are not what the table says.
    """
    before = meta.shards.bytes_read
    found = _LayerWalk(meta, scored, metrics, stream_dir).scores()
    read, whole = meta.shards.bytes_read - before, meta.shards.nbytes
    scored.progress.detail(
        f"weights read: {read / 1e9:.3g} GB, {read / whole:.2f} times what the shards hold"
    )
    return found


class _LayerWalk:
    """One walk through a model's layers; the arguments are :func:`layer_by_layer_scores`'s."""

    def __init__(
        self, meta: MetaModel, scored: ScoredModel, metrics: Sequence[Metric], folder: Path | None
    ) -> None:
        self._meta, self._scored, self._folder = meta, scored, folder
        self._layers, self._batches = scored.layers, scored.batches
        self._of_stream = of_kind(metrics, StreamMetric)
        self._of_answers = of_kind(metrics, AnswerMetric)
        self._runner = LayerRunner(meta.model, self._layers)
        self._cuts: AnswerCuts | None = None
        if self._of_answers:
            refuse_unmeasurable(meta.model, scored.text.mask, scored.positions)
            self._cuts = AnswerCuts(scored, self._runner)
        # Metrics of answers alone would not tell in which layer activations become infinite.
        collected = self._of_stream or [ANY_METRIC]
        self._sums = [
            StreamBatch(len(self._layers), collected, batch.mask_on(), batch.first_sample)
            for batch in self._batches
        ]

    def scores(self) -> dict[str, list[Score]]:
        """Walks, and gives the scores by each metric's name."""
        parts = parts_of(self._meta, self._layers)
        total = len(self._batches) * len(self._layers)
        total += self._cuts.runs if self._cuts else 0
        with (
            contextlib.ExitStack() as stack,
            self._scored.progress.task(
                "score, layer by layer", total=total, unit="runs of a layer"
            ) as task,
        ):
            for name in parts.rest:
                stack.enter_context(self._meta.held(name))
            states = self._through_layers(parts, stack, task)
            found = self._stream_scores()
            if self._cuts and states:
                for name in parts.head:
                    stack.enter_context(self._meta.held(name))
                damages = self._cuts.damages(states, task)
                found |= scores_of_damages(self._of_answers, self._cuts.units, damages)
        return found

    def _through_layers(
        self, parts: Parts, stack: contextlib.ExitStack, task: Task
    ) -> HiddenStates | None:
        states: HiddenStates | None = None
        embedding = stack.enter_context(contextlib.ExitStack())
        for name in parts.embedding:
            embedding.enter_context(self._meta.held(name))
        model, stream = self._meta.model, None
        findings, probed = ProbeFindings(self._layers), probe_inputs(model)
        turns = stack.enter_context(contextlib.closing(filled_in_turn(self._meta, parts.layers)))
        for number in turns:
            with self._runner.only(number):
                run = partial(self._runner.run, probed, stream)
                stream = findings.look([self._layers[number]], run)
                refuse_differing(findings.so_far, model)  # before the text, which may take hours
                if states is None:
                    states = stack.enter_context(self._room(parts, stream))
                for batch in self._batches:
                    self._batch(number, batch, states, task)
            if not number and not self._needs_embedding(parts):
                embedding.close()
                stack.enter_context(self._runner.without_embedding())
        refuse_differing(findings.verdict, model)
        return states

    def _batch(self, number: int, batch: Batch, states: HiddenStates, task: Task) -> None:
        """One batch through one layer, in the whole model and in all cuts that there are."""
        given = states.get(_WHOLE, batch.number) if number else None
        modules, sums = self._layers[number], self._sums[batch.number]
        with contextlib.ExitStack() as stack:
            kept = None
            if self._cuts:
                kept = stack.enter_context(self._cuts.recording(number, batch))
            with tapped([modules], sums):
                output = self._runner.run(batch.inputs(), given)
        task.advance()
        if self._cuts and kept:
            self._cuts.advance(number, batch, kept, states, task)
        states.put(_WHOLE, batch.number, output)

    def _stream_scores(self) -> dict[str, list[Score]]:
        sums = StreamSums(len(self._layers), self._of_stream)
        for batch in self._sums if self._of_stream else ():
            sums.add(batch.sums, batch.counts)
        return sums.scores()

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
            self._folder,
            1 + (len(self._cuts.units) if self._cuts else 0),
            [(*batch.ids.shape, stream.shape[-1]) for batch in self._batches],
            stream.dtype,
            weights_bytes=sum(map(weights.nbytes, others))
            + 2 * max(map(weights.nbytes, parts.layers)),
            progress=self._scored.progress,
        )
