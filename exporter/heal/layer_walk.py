"""Takes a text through a model a layer at a time, as several streams side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from exporter.models.ablation.streams import LayerRunner
from exporter.models.anatomy.residual_stream import LayerModules, LayerStates, tapped
from exporter.models.texts.batches import Batch
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import Progress
from exporter.score.streaming import HiddenStates, room_for_states

if TYPE_CHECKING:
    import torch


class LayerWalk:
    """What stands between two layers is kept for each stream, in memory where it fits.

    Args:
        model: A transformers model.
        layers: Its layers.
        text: The samples.
        batch_size: Samples in one run.
        streams: How many are kept.
        stack: Gives the room for them back.
        progress: Told where they are.

    Attributes:
        batches: The samples in their order.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[LayerModules],
        text: CalibrationText,
        batch_size: int,
        streams: int,
        stack: contextlib.ExitStack,
        progress: Progress,
    ) -> None:
        self._model, self._layers = model, layers
        self._runner = LayerRunner(model, layers)
        self._streams, self._stack, self._progress = streams, stack, progress
        self._states: HiddenStates | None = None
        self._kept: set[tuple[int, int]] = set()
        self.batches = text.batches(batch_size)

    def run(self, layer: int, batch: Batch, stream: int) -> LayerStates:
        """Takes a batch over a layer: from what the stream has kept, or else the embedding."""
        given = self.kept(stream, batch) if (stream, batch.number) in self._kept else None
        found: list[LayerStates] = []
        with self._runner.only(layer), tapped([self._layers[layer]], found.append):
            self._runner.run(batch.inputs(self._model.device), given)
        return found[0]

    def keep(self, stream: int, batch: Batch, tensor: torch.Tensor) -> None:
        """Keeps ``[batch, tokens, hidden]`` in the place of what the stream had for the batch."""
        states = self._states = self._states or self._room(tensor)
        states.put(stream, batch.number, tensor.cpu())
        self._kept.add((stream, batch.number))

    def kept(self, stream: int, batch: Batch) -> torch.Tensor:
        """What was kept, on the model's device."""
        assert self._states is not None, "nothing was kept yet"
        return self._states.get(stream, batch.number).to(self._model.device)

    def _room(self, tensor: torch.Tensor) -> HiddenStates:
        shapes = [(*batch.ids.shape, tensor.shape[-1]) for batch in self.batches]
        room = room_for_states(
            None, self._streams, shapes, tensor.dtype, weights_bytes=0, progress=self._progress
        )
        return self._stack.enter_context(room)
