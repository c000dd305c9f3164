"""Runs a model whose weights are in its shards: each module's come for its turn, and go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from exporter.models.loading.meta_model import MetaModel

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def filled_while_running(
    meta: MetaModel, modules: Iterable[torch.nn.Module] | None = None
) -> Iterator[None]:
    """Has modules filled while they run, and emptied after it; every run reads their weights once.

    A module whose weights are used by another while it does not run itself makes PyTorch raise:
    there is nothing in them.
    """
    if modules is None:
        modules = [module for module in meta.model.modules() if module._parameters]
    names = {module: name for name, module in meta.model.named_modules()}
    placed = {names[module]: module for module in modules}
    inside = {name for path in placed for name in meta.weights.names(path)}
    with contextlib.ExitStack() as stack:
        for name in meta.weights.names():
            if name not in inside:
                stack.enter_context(meta.held(name))
        for path, module in placed.items():
            for handle in _hooks(meta, path, module):
                stack.callback(handle.remove)
        yield


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
