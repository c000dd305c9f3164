"""Runs a model whose weights stay in their shards: each module is filled just before it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from exporter.models.loading.meta_model import MetaModel


@contextlib.contextmanager
def filled_on_the_way(meta: MetaModel) -> Iterator[None]:
    """Has each module with weights of its own filled while it runs, and emptied after it.

    A pass then reads all weights once and holds those of one module. A module whose weights are
    used by another while it does not run itself makes PyTorch raise: there is nothing in them.

    Args:
        meta: The model; in the block it can be called like any other. Where its empty parameters
            were given a wider type than its own, so are those with content.
    """
    handles = []
    try:
        for name, module in meta.model.named_modules():
            if module._parameters:
                handles += _hooks(meta, name, module)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(meta: MetaModel, name: str, module: torch.nn.Module) -> list[Any]:
    # Now: one inside another with weights of its own is filled by that one first, unwidened.
    wanted = {own: p.dtype for own, p in module._parameters.items() if p is not None}

    def fill(*_: Any) -> None:
        meta.materialise(name)
        for own, parameter in module._parameters.items():
            if parameter is not None:
                parameter.data = parameter.data.to(wanted[own])

    def empty(*_: Any) -> None:
        meta.release(name)

    return [
        module.register_forward_pre_hook(fill),
        module.register_forward_hook(empty, always_call=True),
    ]
