"""Where a model without its weights keeps its sublayers, and the probe of it, layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from exporter.models.ablation.layer_runner import LayerRunner
from exporter.models.anatomy.architectures import (
    candidate_layers,
    layer_modules,
    refuse_differing,
    unknown_layers,
)
from exporter.models.anatomy.families import FAMILIES
from exporter.models.anatomy.residual_stream import (
    LayerModules,
    LayerStates,
    ProbeFindings,
    output_of,
    probe_inputs,
    silenced,
    tapped,
)
from exporter.models.loading.meta_model import MetaModel
from exporter.score.streaming.parts import parts_of

if TYPE_CHECKING:
    import torch


class LayerProbe:
    """Takes a few tokens through the layers, as the probe of a model in memory does."""

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

    def refuse_so_far(self, model: Any) -> None:
        """Refuses a model of which a layer is not what it was thought to be.

        Raises:
            UnknownArchitectureError: The probe found that.
        """
        refuse_differing(self._findings.so_far, model)

    def refuse(self, model: Any) -> None:
        """The same behind the last layer: also where a layer never ran.

        Raises:
            UnknownArchitectureError: The probe found that.
        """
        refuse_differing(self._findings.verdict, model)


def layers_of(meta: MetaModel) -> list[LayerModules]:
    """Finds the modules of every layer.

    For a model type that is not in the table the first layer is read and held against every row;
    the walk's own probe then looks at the others.

    Raises:
        UnknownArchitectureError: No row fits.
    """
    if meta.model.config.model_type in FAMILIES:
        return layer_modules(meta.model)
    for layers in candidate_layers(meta.model):
        if _first_layer_fits(meta, layers):
            return layers
    raise unknown_layers(meta.model)


def _first_layer_fits(meta: MetaModel, layers: list[LayerModules]) -> bool:
    parts = parts_of(meta, layers)
    with contextlib.ExitStack() as stack:
        for name in (*parts.embedding, *parts.rest, parts.layers[0]):
            stack.enter_context(meta.held(name))
        runner = LayerRunner(meta.model, layers)
        found = LayerProbe(meta.model, layers)
        with runner.only(0):
            found.layer(0, runner)
    return found.fits
