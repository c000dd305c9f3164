"""What a graph tells about itself, read without its weights."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.files import sha256_files
from graph_passes.files.storage import data_files, load_model
from graph_passes.finding.shapes import head_size
from graph_passes.pipeline import graph_size

if TYPE_CHECKING:
    import onnx_ir as ir

CACHE_INPUT = re.compile(r"past_key_values\.([0-9]{1,4})\.(key|value)")
"""The names of KV cache inputs; groups: layer, key or value."""

_SHORT_NAMES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64"}


@dataclass(frozen=True)
class GraphFacts:
    """Sizes of an ONNX model."""

    file_bytes: int
    sha256: str
    parameters: int
    nodes: int
    precision: str  # the type that holds most of the initializers' bytes, such as `fp32`
    kv_cache_bytes_per_token: int
    vocabulary: int | None  # rows of the table that `input_ids` looks up; None where there is none
    metadata: dict[str, str]
    inputs: tuple[str, ...] = ()


def read_facts(model_path: Path) -> GraphFacts:
    """Reads the graph; the weights are hashed as files and never loaded."""
    model = load_model(model_path)
    size = graph_size(model)
    files = [model_path, *data_files(model)]
    return GraphFacts(
        file_bytes=sum(path.stat().st_size for path in files),
        sha256=sha256_files(files, model_path.parent),
        parameters=size.parameters,
        nodes=size.nodes,
        precision=_precision(model),
        kv_cache_bytes_per_token=sum(map(_bytes_per_token, model.graph.inputs)),
        vocabulary=_vocabulary(model),
        metadata=dict(model.metadata_props),
        inputs=tuple(_input_names(model.graph)),
    )


def output_shape(model: ir.Model, name: str) -> tuple[int | str | None, ...] | None:
    """An output's shape, numbers and names; None where there is no such output, or no shape."""
    shape = next((value.shape for value in model.graph.outputs if value.name == name), None)
    if shape is None:
        return None
    return tuple(size if isinstance(size, int) else size.value for size in shape)


def _input_names(graph: ir.Graph) -> Iterator[str]:
    for value in graph.inputs:
        if value.name and value.name not in graph.initializers:  # old graphs list weights, too
            yield value.name


def _precision(model: ir.Model) -> str:
    held: Counter[str] = Counter()
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                held[value.const_value.dtype.name] += value.const_value.nbytes
    name = held.most_common(1)[0][0] if held else "none"
    return _SHORT_NAMES.get(name, name.lower())


def _bytes_per_token(value: ir.Value) -> int:
    """Bytes of a cache input ``[batch, heads, past, head_dim]`` for one position.

    A head size that has only a name follows from what the graph does with the cache.
    """
    if not CACHE_INPUT.fullmatch(value.name or "") or value.shape is None or value.dtype is None:
        return 0
    # Batch and past are the dynamic ones; where they are static they are left out all the same.
    static = [dim for dim in value.shape[1:-1] if isinstance(dim, int)][:1]
    return math.ceil(math.prod(static) * (head_size(value) or 1) * value.dtype.itemsize)


def _vocabulary(model: ir.Model) -> int | None:
    for value in model.graph.inputs:
        if value.name in ("input_ids", "decoder_input_ids"):
            tables = (node.inputs[0] for node in value.consumers() if node.op_type == "Gather")
            for table in tables:
                if table is not None and table.const_value is not None:
                    return table.const_value.shape.numpy()[0]
    return None
