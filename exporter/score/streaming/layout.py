"""Where a model without its weights keeps its sublayers."""

from __future__ import annotations

import contextlib

from exporter.models.anatomy.architectures import candidate_layers, layer_modules, unknown_layers
from exporter.models.anatomy.families import FAMILIES
from exporter.models.anatomy.residual_stream import LayerModules
from exporter.models.loading.meta_model import MetaModel
from exporter.score.streaming.layer_runner import LayerRunner
from exporter.score.streaming.parts import parts_of
from exporter.score.streaming.probing import LayerProbe


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
