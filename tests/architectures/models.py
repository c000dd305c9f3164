"""Which modules of an architecture stand for its sublayers, and how they fall silent."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import product
from typing import Any, NamedTuple

from graph_passes import SublayerRef
from tests.architectures.catalogue import Architecture
from tests.tiny_models import tiny_model

_MOST_LAYERS = 8


class Silenced(NamedTuple):
    """What is silenced for one sublayer: the n-th run of a module that layers may share."""

    module: Any
    run: int


def build(architecture: Architecture) -> Any:
    """The model in eval mode, its weights large enough that every branch counts."""
    head = {"vision": "", "audio": "", "encoder": ""}.get(architecture.graph, "CausalLM")
    if architecture.graph.startswith("seq2seq"):
        head = "SpeechSeq2Seq" if architecture.type_name == "whisper" else "Seq2SeqLM"
    return tiny_model(architecture.type_name, head=head, **architecture.settings)


def sublayer_modules(
    architecture: Architecture, model: Any
) -> dict[SublayerRef, tuple[Silenced, ...]]:
    """Each sublayer that the model has, and what is silenced for it."""
    if not architecture.paths:
        from exporter.models.architectures import sublayers

        return {
            SublayerRef(part.layer, part.kind): (Silenced(part.contribution, 0),)
            for part in sublayers(model)
        }
    silenced: dict[SublayerRef, tuple[Silenced, ...]] = {}
    runs: Counter[Any] = Counter()
    for layer, numbers in enumerate(_layers(architecture, model)):
        for kind, paths in architecture.paths.items():
            if modules := _follow(model, paths, numbers):
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


def _follow(model: Any, paths: str, numbers: tuple[int, ...]) -> list[Any]:
    """The modules that the first of several alternatives leads to; none if none does.

    ``a.{}.b|c&d`` is ``a.{}.b``, or ``a.{}.c`` and ``a.{}.d``.
    """
    before, hole, last = paths.rpartition("{}.")
    for alternative in last.split("|"):
        modules = []
        for part in alternative.split("&"):
            module = model
            for name in f"{before}{hole}{part}".format(*numbers).split("."):
                module = getattr(module, name, None)
            modules.append(module)
        if None not in modules:
            return modules
    return []


@contextlib.contextmanager
def silenced(chosen: Collection[Silenced], everything: Collection[Silenced]) -> Iterator[None]:
    """Makes the chosen sublayers contribute nothing; no hook is left behind."""
    total = Counter(part.module for part in everything)
    with contextlib.ExitStack() as hooks:
        for module in dict.fromkeys(part.module for part in chosen):
            runs = {part.run for part in chosen if part.module is module}
            hook = _silencer(runs, total[module])
            hooks.callback(module.register_forward_hook(hook).remove)
        yield


def _silencer(runs: set[int], total: int) -> Any:
    """Returns zeros in some of the runs of a module within one pass through the model."""
    count = 0

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        nonlocal count
        run, count = count % total, count + 1
        if run not in runs:
            return output
        if isinstance(output, tuple):
            return (output[0].new_zeros(output[0].shape), *output[1:])
        return output.new_zeros(output.shape)

    return hook
