"""Builds an architecture as a tiny random model, and knows the modules of its sublayers."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from graph_passes import SublayerRef
from tests.architectures.catalogue import Architecture

_AUTO = {
    "decoder": "AutoModelForCausalLM",
    "hybrid decoder": "AutoModelForCausalLM",
    "seq2seq encoder": "AutoModelForSeq2SeqLM",
    "seq2seq decoder": "AutoModelForSeq2SeqLM",
}
_SPREAD = 0.1
_MOST_LAYERS = 8


@dataclass(frozen=True)
class Silenced:
    """What is silenced for one sublayer: the n-th run of a module that layers may share."""

    module: Any
    run: int


def build(architecture: Architecture) -> Any:
    """The model in eval mode, its weights large enough that every branch counts."""
    import torch
    import transformers

    from tests.tiny_models import tiny_config

    config = tiny_config(architecture.type_name, **architecture.settings)
    torch.manual_seed(0)
    if architecture.model_class:
        model = getattr(transformers, architecture.model_class)(config)
    else:
        auto = getattr(transformers, _AUTO.get(architecture.graph, "AutoModel"))
        model = auto.from_config(config)
    model = model.eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=_SPREAD)
    return model


def sublayer_modules(
    architecture: Architecture, model: Any
) -> dict[SublayerRef, tuple[Silenced, ...]]:
    """Each sublayer that the model has, and what is silenced for it."""
    if not architecture.paths:
        return _of_family(model)
    silenced: dict[SublayerRef, tuple[Silenced, ...]] = {}
    runs: Counter[Any] = Counter()
    for layer, numbers in enumerate(_layers(architecture, model)):
        for kind, paths in architecture.paths.items():
            modules = _follow(model, paths, numbers)
            if modules:
                ref = SublayerRef(layer, kind)  # type: ignore[arg-type]
                silenced[ref] = tuple(Silenced(module, runs[module]) for module in modules)
                runs.update(modules)
    return silenced


def _layers(architecture: Architecture, model: Any) -> list[tuple[int, ...]]:
    """The numbers that stand for each layer in the paths."""
    paths = list(architecture.paths.values())
    holes = paths[0].count("{}")
    if not holes:  # one layer that is run again and again
        return [()] * model.config.num_hidden_layers
    return [
        numbers
        for numbers in product(range(_MOST_LAYERS), repeat=holes)
        if any(_follow(model, path, numbers) for path in paths)
    ]


@contextlib.contextmanager
def silenced(chosen: Collection[Silenced], everything: Collection[Silenced]) -> Iterator[None]:
    """Makes the chosen sublayers contribute nothing; no hook is left behind."""
    total = Counter(part.module for part in everything)
    with contextlib.ExitStack() as hooks:
        for module in dict.fromkeys(part.module for part in chosen):
            runs = {part.run for part in chosen if part.module is module}
            hook = _Silencer(runs, total[module])
            hooks.callback(module.register_forward_hook(hook).remove)
        yield


class _Silencer:
    """Returns zeros in some of the runs of a module within one pass through the model."""

    def __init__(self, runs: set[int], total: int) -> None:
        self._runs, self._total, self._count = runs, total, 0

    def __call__(self, _module: Any, _inputs: Any, output: Any) -> Any:
        run = self._count % self._total
        self._count += 1
        if run not in self._runs:
            return output
        if isinstance(output, tuple):
            return (output[0].new_zeros(output[0].shape), *output[1:])
        return output.new_zeros(output.shape)


def _of_family(model: Any) -> dict[SublayerRef, tuple[Silenced, ...]]:
    from exporter.models.architectures import sublayers

    return {
        SublayerRef(part.layer, part.kind): (Silenced(part.contribution, 0),)
        for part in sublayers(model)
    }


def _follow(model: Any, paths: str, numbers: tuple[int, ...]) -> list[Any]:
    """The modules that the first of several alternatives leads to; none if none does."""
    for alternative in _spelled_out(paths):
        modules = [_module(model, path.format(*numbers)) for path in alternative]
        if None not in modules:
            return modules
    return []


def _module(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name, None)
    return model


def _spelled_out(paths: str) -> list[list[str]]:
    """``a.{}.b|c&d`` is ``a.{}.b``, or ``a.{}.c`` and ``a.{}.d``."""
    before, hole, last = paths.rpartition("{}.")
    return [
        [f"{before}{hole}{part}" for part in alternative.split("&")]
        for alternative in last.split("|")
    ]
