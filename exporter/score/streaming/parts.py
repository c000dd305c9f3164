"""Where a model without its weights keeps its layers, and how their weights come and go."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from exporter.models.ablation.layer_runner import LayerRunner
from exporter.models.anatomy.architectures import candidate_layers, layer_modules, unknown_layers
from exporter.models.anatomy.families import FAMILIES
from exporter.models.anatomy.residual_stream import LayerModules, ProbeFindings, probe_inputs
from exporter.models.loading.meta_model import Fetched, MetaModel


@dataclass(frozen=True)
class Parts:
    """A model's modules and parameters by their dotted names.

    Attributes:
        layers: The layers, in order.
        embedding: Parameters of the input embedding.
        rest: Parameters that running the layers needs beside them.
        head: Parameters that only the head needs.
        tied: Parameters of the head that are the embedding's.
    """

    layers: list[str]
    embedding: list[str]
    rest: list[str]
    head: list[str]
    tied: list[str]


def parts_of(meta: MetaModel, layers: Sequence[LayerModules]) -> Parts:
    """Sorts a model's parameters."""
    model: Any = meta.model
    names = {id(module): name for name, module in model.named_modules()}
    prefixes = [names[id(modules.layer)] for modules in layers]
    in_layers = {name for prefix in prefixes for name in meta.weights.names(prefix)}
    others = [name for name in meta.weights.names() if name not in in_layers]
    backbone = names[id(model.base_model)]
    needed = [name for name in others if not backbone or name.startswith(f"{backbone}.")]
    embedding = meta.weights.names(names[id(model.get_input_embeddings())])
    tied = {alias for name in embedding for alias in meta.weights.aliases(name)}
    return Parts(
        layers=prefixes,
        embedding=embedding,
        rest=[name for name in needed if name not in embedding],
        head=[name for name in others if name not in needed and name not in tied],
        tied=sorted(tied.difference(embedding)),
    )


def filled_in_turn(meta: MetaModel, prefixes: Sequence[str]) -> Generator[int]:
    """Yields each module's place in the list while it is filled; at most two are in memory.

    Close the generator, so that nothing stays filled when the caller fails.

    Raises:
        ModelSourceError: A shard can't be read.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        coming: list[Future[Fetched]] = [pool.submit(meta.weights.fetch, prefixes[0], stop)]
        try:
            for number, prefix in enumerate(prefixes):
                # Popped: a future that is kept keeps the tensors, too.
                meta.materialise(prefix, coming.pop().result())
                if number + 1 < len(prefixes):
                    coming.append(pool.submit(meta.weights.fetch, prefixes[number + 1], stop))
                try:
                    yield number
                finally:
                    meta.release(prefix)
        finally:
            stop.set()  # the pool waits for what it reads, and that may be a gigabyte


def layers_of(meta: MetaModel) -> list[LayerModules]:
    """Finds the modules of every layer.

    For a model type that is not in the table the first layer is read and held against every row;
    the walk then looks at the others.

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
        findings, inputs = ProbeFindings(layers), probe_inputs(meta.model)
        with runner.only(0):
            findings.look(layers[:1], partial(runner.run, inputs, None))
    return findings.so_far == "adds_up"
