"""The probe of the layers' layout, a layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from exporter.models.anatomy.residual_stream import (
    LayerModules,
    LayerStates,
    ProbeFindings,
    output_of,
    probe_inputs,
    silenced,
    tapped,
)
from exporter.models.loading.model_source import LoadedModel
from exporter.score.scoring import refuse_differing
from exporter.score.streaming.layer_runner import LayerRunner

if TYPE_CHECKING:
    import torch


class LayerProbe:
    """Takes tokens through the layers, as :func:`~exporter.models.anatomy.residual_stream.probe`.

    Args:
        model: A transformers model.
        layers: Its layers, as they are thought to be.
    """

    def __init__(self, model: Any, layers: Sequence[LayerModules]) -> None:
        self._layers = layers
        self._inputs = probe_inputs(model)
        self._findings = ProbeFindings(layers)
        self._stream: torch.Tensor | None = None

    def layer(self, number: int, runner: LayerRunner) -> torch.Tensor:
        """Judges the layer that the runner is set to.

        Returns:
            What it gives for the few tokens, ``[1, tokens, hidden]``.
        """
        modules, before = self._layers[number], self._stream
        states: list[LayerStates] = []
        with tapped([modules], states.append), output_of(modules.mlp) as live:
            self._stream = stream = runner.run(self._inputs, before)
        for state in states:
            self._findings.take(state)
        if not number:
            with silenced([modules.attention]), output_of(modules.mlp) as deaf:
                runner.run(self._inputs, before)
            self._findings.reads_attention = not live[0].equal(deaf[0])
        return stream

    @property
    def fits(self) -> bool:
        """Whether every layer so far is what it was thought to be, and no branch was silent."""
        return self._findings.so_far == "adds_up"

    def refuse_so_far(self, loaded: LoadedModel) -> None:
        """Refuses a model of which a layer is not what it was thought to be.

        Raises:
            UnknownArchitectureError: The probe found that.
        """
        refuse_differing(self._findings.so_far, loaded)

    def refuse(self, loaded: LoadedModel) -> None:
        """The same behind the last layer: also where a layer never ran.

        Raises:
            UnknownArchitectureError: The probe found that.
        """
        refuse_differing(self._findings.verdict, loaded)
