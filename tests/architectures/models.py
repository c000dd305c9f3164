"""Builds an architecture as a tiny random model, and knows the modules of its sublayers."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
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

    from tests.exporter.tiny_families import tiny_config

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


def sublayer_modules(architecture: Architecture, model: Any) -> dict[SublayerRef, Silenced]:
    """Each sublayer that the model has, and what is silenced for it."""
    if not architecture.paths:
        return _of_family(model)
    found: dict[SublayerRef, Silenced] = {}
    runs: Counter[Any] = Counter()
    layers = _number_of_layers(model)
    for layer in range(layers):
        for kind, paths in architecture.paths.items():
            module = _follow(model, paths, layer)
            if module is not None:
                found[SublayerRef(layer, kind)] = Silenced(module, runs[module])  # type: ignore[arg-type]
                runs[module] += 1
    return found


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


def _of_family(model: Any) -> dict[SublayerRef, Silenced]:
    from exporter.architectures import sublayers

    return {
        SublayerRef(part.layer, part.kind): Silenced(part.contribution, 0)
        for part in sublayers(model)
    }


def _number_of_layers(model: Any) -> int:
    config = model.config.get_text_config()
    names = ("num_hidden_layers", "encoder_layers", "num_layers", "n_layer")
    return next(n for name in names if isinstance(n := getattr(config, name, None), int))


def _follow(model: Any, paths: str, layer: int) -> Any:
    """The first of several dotted paths that leads to a module; None if none does."""
    for path in _spelled_out(paths):
        here = model
        for name in path.format(layer).split("."):
            here = getattr(here, name, None)
        if here is not None:
            return here
    return None


def _spelled_out(paths: str) -> list[str]:
    first, *others = paths.split("|")
    prefix = first.rpartition("{}.")
    return [first, *(f"{prefix[0]}{prefix[1]}{other}" for other in others)]
