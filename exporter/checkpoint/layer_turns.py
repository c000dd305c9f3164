"""Runs a model whose weights are in its shards: each layer's come for its turn, and go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from exporter.models.anatomy.architectures import layer_modules, unknown_layers
from exporter.models.anatomy.families import FAMILIES
from exporter.models.loading.meta_model import MetaModel

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def runnable(meta: MetaModel, layers: Sequence[torch.nn.Module] | None = None) -> Iterator[None]:
    """Lets a model run while the block does; every run reads all layers' weights once.

    What belongs to no layer, such as the embedding and the head, stays in memory meanwhile.

    Args:
        meta: The model, whole or pruned.
        layers: Its layers, which may lack the modules that they are known by; None for a whole one.

    Raises:
        UnknownArchitectureError: It is not known where the model keeps its layers.
        ModelSourceError: A shard can't be read.
    """
    model: Any = meta.model
    found = layers_of(model) if layers is None else layers
    names = {module: name for name, module in model.named_modules()}
    placed = {names[layer]: layer for layer in found}
    inside = {name for path in placed for name in meta.weights.names(path)}
    with contextlib.ExitStack() as stack:
        for name in meta.weights.names():
            if name not in inside:
                stack.enter_context(meta.held(name))
        for path, layer in placed.items():
            come, go = partial(_come, meta, path), partial(_go, meta, path)
            stack.callback(layer.register_forward_pre_hook(come).remove)
            stack.callback(layer.register_forward_hook(go, always_call=True).remove)
        yield


def layers_of(model: Any) -> list[torch.nn.Module]:
    """A whole model's layers.

    Raises:
        UnknownArchitectureError: It is not known where the model keeps them.
    """
    if model.config.model_type not in FAMILIES:
        raise unknown_layers(model)  # Looking for them takes a run.
    return [each.layer for each in layer_modules(model)]


def _come(meta: MetaModel, path: str, *_: Any) -> None:
    meta.materialise(path)


def _go(meta: MetaModel, path: str, *_: Any) -> None:
    meta.release(path)
