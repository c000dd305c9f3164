"""Skips every sublayer once while the layers come by, each cut a stream of its own.

At its layer a cut leaves the whole model's stream; from there on it goes through the layers beside
it. So the weights are read once for all cuts, and each cut is computed from its layer on, by the
same operations as in :class:`exporter.models.ablation.streams.StreamRunner`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from exporter.models.ablation import NOTHING, BranchReplacements, Damage
from exporter.models.ablation.damage import joined
from exporter.models.ablation.meter import judged, reference_of
from exporter.models.ablation.streams import (
    Streams,
    branch_cut,
    counting_outputs,
    recorded,
    strided_head,
    without_mlp,
)
from exporter.models.anatomy.architectures import SublayerModules, sublayers_of
from exporter.models.anatomy.residual_stream import LayerModules, first_tensor
from exporter.models.texts.batches import Batch
from exporter.progress import Task
from exporter.score.answer_pass import answer_units
from exporter.score.streaming.hidden_states import HiddenStates
from exporter.score.streaming.layer_runner import LayerRunner
from graph_passes.types import DeletionKind, SublayerRef, sublayer_kinds

if TYPE_CHECKING:
    import torch


class AnswerCuts:
    """All cuts of one sublayer or block, as streams 1, 2, …; stream 0 is the whole model's.

    Args:
        model: A transformers model with a language head.
        layers: Its layers.
        blocks: Whether whole blocks are cut as well.
        positions: Answers are compared at every so many positions.

    Attributes:
        units: What is cut, in the streams' order.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[LayerModules],
        *,
        blocks: bool,
        positions: int,
    ) -> None:
        self._head = model.get_output_embeddings()
        self._layers, self._stride = layers, positions
        self.units = answer_units(len(layers), blocks=blocks)
        self._parts: dict[SublayerRef, SublayerModules] = {
            part.ref: part for part in sublayers_of(layers)
        }
        self._returned: dict[SublayerRef, int] = {}

    def runs(self, batches: int) -> int:
        """How many runs of a layer or of the head there will be beside the whole model's."""
        layers, cuts = len(self._layers), len(self.units)
        return batches * (cuts * (layers + 1) // 2 + cuts + 1)

    @contextlib.contextmanager
    def recording(self, number: int, batch: Batch) -> Iterator[Streams]:
        """Keeps of the whole model's run through a layer what the cuts there begin from."""
        kept = Streams(batch.inputs(), {}, [None] * len(self._layers), {})
        parts = {name: part for name, part in self._parts.items() if name[0] == number}
        with recorded(self._layers[number], kept), counting_outputs(parts, self._returned):
            yield kept

    def advance(
        self,
        number: int,
        batch: Batch,
        given: torch.Tensor | None,
        kept: Streams,
        runner: LayerRunner,
        states: HiddenStates,
        task: Task,
    ) -> None:
        """Begins a layer's own cuts and takes the others through it.

        Args:
            number: The layer's.
            batch: The samples.
            given: What the layer below gave in the whole model; None for the first.
            kept: Of the whole model's run through this layer.
            runner: Set to this layer.
            states: Where the streams are kept.
            task: Advanced at every run.
        """
        for stream, (layer, kind) in enumerate(self.units, start=1):
            if layer < number:
                output = runner.run(batch.inputs(), states.get(stream, batch.number))
            elif layer == number:
                output = self._begun(number, kind, batch, given, kept, runner)
            else:
                break
            states.put(stream, batch.number, output)
            task.advance()

    def damages(
        self,
        batches: Sequence[Batch],
        runner: LayerRunner,
        states: HiddenStates,
        task: Task,
    ) -> list[Damage]:
        """What each cut does to the answers, when all layers are through and the head is there.

        Raises:
            ScoringError: Logits are not finite.
        """
        cuts: list[BranchReplacements] = [_cut(number, kind) for number, kind in self.units]
        parts: list[list[Damage]] = [[] for _ in cuts]
        with runner.only(None), strided_head(self._head, self._stride):
            for batch in batches:
                for stream, cut in enumerate([{}, *cuts]):
                    given = states.get(stream, batch.number)
                    logits = runner.logits(batch.inputs(), given)
                    if not stream:
                        reference = reference_of(logits, batch, self._stride)
                    damage = judged(reference, logits, cut, batch.first_sample)
                    if stream:
                        parts[stream - 1].append(damage)
                    task.advance()
        return [joined(found) for found in parts]

    def _begun(
        self,
        number: int,
        kind: DeletionKind,
        batch: Batch,
        given: torch.Tensor | None,
        kept: Streams,
        runner: LayerRunner,
    ) -> torch.Tensor:
        if kind == "mlp" and number in kept.attended:
            output = kept.outputs[number]
            return first_tensor(without_mlp(kept.attended[number], NOTHING, output))
        with contextlib.ExitStack() as stack:
            for name in _cut(number, kind):
                stack.enter_context(branch_cut(self._parts[name], NOTHING, self._returned[name]))
            return runner.run(batch.inputs(), given)


def _cut(number: int, kind: DeletionKind) -> BranchReplacements:
    return {SublayerRef(number, branch): NOTHING for branch in sublayer_kinds(kind)}
