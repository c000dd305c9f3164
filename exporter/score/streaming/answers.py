"""Skips every sublayer once while the layers come by, each cut a stream of its own.

At its layer a cut leaves the whole model's stream; from there on it goes through the layers beside
it. So the weights are read once for all cuts, and each cut is computed from its layer on, by the
same operations as in :class:`exporter.models.ablation.streams.StreamRunner`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from exporter.models.ablation.branch_replacements import NOTHING, BranchReplacements
from exporter.models.ablation.damage import Damage, joined
from exporter.models.ablation.layer_runner import LayerRunner
from exporter.models.ablation.meter import damage_of, reference_of
from exporter.models.ablation.streams import CutBranches, Streams, head_at, recorded, without_mlp
from exporter.models.anatomy.residual_stream import first_tensor
from exporter.models.texts.batches import Batch
from exporter.progress import Task
from exporter.score.answer_pass import answer_units
from exporter.score.scored_model import ScoredModel
from exporter.score.streaming.hidden_states import HiddenStates
from graph_passes.types import SublayerRef, sublayer_kinds

if TYPE_CHECKING:
    import torch


class AnswerCuts:
    """All cuts of one sublayer or block, as streams 1, 2, …; stream 0 is the whole model's.

    Attributes:
        units: What is cut, in the streams' order.
    """

    def __init__(self, scored: ScoredModel, runner: LayerRunner) -> None:
        self._scored, self._runner = scored, runner
        self.units = answer_units(len(scored.layers), blocks=scored.blocks)
        self._cuts: list[BranchReplacements] = [
            {SublayerRef(layer, branch): NOTHING for branch in sublayer_kinds(kind)}
            for layer, kind in self.units
        ]
        self._branches = CutBranches(scored.layers)

    @property
    def runs(self) -> int:
        """How many runs of a layer or of the head there will be beside the whole model's."""
        layers, cuts = len(self._scored.layers), len(self.units)
        return len(self._scored.batches) * (cuts * (layers + 1) // 2 + cuts + 1)

    @contextlib.contextmanager
    def recording(self, number: int, batch: Batch) -> Iterator[Streams]:
        """Keeps of the whole model's run through a layer what the cuts there begin from."""
        layers = self._scored.layers
        kept = Streams(batch.inputs(), {}, [None] * len(layers), {})
        with recorded(layers[number], kept), self._branches.counted(number):
            yield kept

    def advance(
        self, number: int, batch: Batch, kept: Streams, states: HiddenStates, task: Task
    ) -> None:
        """Begins a layer's own cuts and takes the others through it; the runner is set to it.

        Args:
            number: The layer's.
            batch: The samples.
            kept: Of the whole model's run through this layer.
            states: Where the streams are kept; the whole model's is still that below the layer.
            task: Advanced at every run.
        """
        for stream, (layer, _) in enumerate(self.units, start=1):
            if layer < number:
                output = self._runner.run(batch.inputs(), states.get(stream, batch.number))
            elif layer == number:
                output = self._begun(stream, batch, kept, states)
            else:
                break
            states.put(stream, batch.number, output)
            task.advance()

    def damages(self, states: HiddenStates, task: Task) -> list[Damage]:
        """What each cut does to the answers, when all layers are through and the head is there.

        Raises:
            ScoringError: Logits are not finite.
        """
        stride = self._scored.positions
        head = self._scored.model.get_output_embeddings()
        parts: list[list[Damage]] = [[] for _ in self._cuts]
        with self._runner.only(None), head_at(head, lambda hidden: hidden[:, ::stride]):
            for batch in self._scored.batches:
                for stream, cut in enumerate([{}, *self._cuts]):
                    given = states.get(stream, batch.number)
                    logits = self._runner.logits(batch.inputs(), given)
                    if not stream:
                        reference = reference_of(logits, batch, stride)
                    damage = damage_of(reference, logits, cut, batch.first_sample)
                    if stream:
                        parts[stream - 1].append(damage)
                    task.advance()
        return [joined(found) for found in parts]

    def _begun(
        self, stream: int, batch: Batch, kept: Streams, states: HiddenStates
    ) -> torch.Tensor:
        number, kind = self.units[stream - 1]
        if kind == "mlp" and number in kept.attended:
            output = kept.outputs[number]
            return first_tensor(without_mlp(kept.attended[number], NOTHING, output))
        with self._branches.cut(self._cuts[stream - 1]):
            given = states.get(0, batch.number) if number else None
            return self._runner.run(batch.inputs(), given)
