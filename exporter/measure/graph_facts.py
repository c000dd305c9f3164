"""What a graph tells about itself, read without its weights."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.errors import OnnxFileError
from exporter.files import sha256_files

if TYPE_CHECKING:
    import onnx_ir as ir

CACHE_INPUT = re.compile(r"past_key_values\.(\d+)\.(key|value)")
"""The names of KV cache inputs; groups: layer, key or value."""

_SHORT_NAMES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64"}


@dataclass(frozen=True)
class GraphFacts:
    """Sizes of an ONNX model.

    Attributes:
        files: The graph's file and its external data.
        file_bytes: What they take on disk together.
        sha256: One hash over all of them.
        parameters: Elements of all initializers.
        nodes: Nodes, subgraphs included.
        precision: The type that holds most of the weights' bytes, such as ``fp32``.
        kv_cache_bytes_per_token: What one token of one sequence adds to the KV cache.
        vocabulary: Rows of the table that ``input_ids`` looks up; None where there is none.
        metadata: The model's ``metadata_props``.
    """

    files: tuple[Path, ...]
    file_bytes: int
    sha256: str
    parameters: int
    nodes: int
    precision: str
    kv_cache_bytes_per_token: int
    vocabulary: int | None
    metadata: dict[str, str]


def read_facts(model_path: Path) -> GraphFacts:
    """Reads the graph; the weights are hashed as files and never loaded.

    Raises:
        OnnxFileError: When the file is no ONNX model, or its external data is missing or lies
            outside its folder.
    """
    model = _load(model_path)
    tensors = list(_initializers(model))
    files = (model_path, *sorted(_data_files(model_path, tensors)))
    return GraphFacts(
        files=files,
        file_bytes=sum(path.stat().st_size for path in files),
        sha256=sha256_files(files, model_path.parent),
        parameters=sum(tensor.size for tensor in tensors),
        nodes=sum(1 for _ in model.graph.all_nodes()),
        precision=_precision(tensors),
        kv_cache_bytes_per_token=sum(map(_bytes_per_token, model.graph.inputs)),
        vocabulary=_vocabulary(model),
        metadata=dict(model.metadata_props),
    )


def _load(path: Path) -> ir.Model:
    import onnx_ir

    if not path.is_file():
        raise OnnxFileError(f"The ONNX file {path} does not exist.")
    try:
        model = onnx_ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise their own classes
        raise OnnxFileError(
            f"{path} is not a complete ONNX file ({type(error).__name__}).",
            "It may be cut off: export or copy it again.",
        ) from error
    if not model.graph.outputs:
        raise OnnxFileError(f"{path} holds no graph with outputs.")
    return model


def _initializers(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value


def _data_files(model_path: Path, tensors: list[ir.TensorProtocol]) -> set[Path]:
    import onnx_ir

    folder = model_path.parent.resolve()
    found: set[Path] = set()
    for location in {str(t.location) for t in tensors if isinstance(t, onnx_ir.ExternalTensor)}:
        path = model_path.parent / location
        if not path.resolve().is_relative_to(folder):
            raise OnnxFileError(
                f"{model_path}: its external data {location} lies outside the model's folder.",
                "Copy the data beside the ONNX file; links out of the folder are not followed.",
            )
        if not path.is_file():
            raise OnnxFileError(
                f"{model_path}: its external data {location} is missing.",
                "Copy the data file beside the ONNX file.",
            )
        found.add(path)
    return found


def _precision(tensors: list[ir.TensorProtocol]) -> str:
    held: Counter[str] = Counter()
    for tensor in tensors:
        held[tensor.dtype.name] += tensor.nbytes
    if not held:
        return "none"
    name = held.most_common(1)[0][0]
    return _SHORT_NAMES.get(name, name.lower())


def _bytes_per_token(value: ir.Value) -> int:
    """Bytes of a cache input ``[batch, heads, past, head_dim]`` for one position."""
    if not CACHE_INPUT.fullmatch(value.name or "") or value.shape is None or value.dtype is None:
        return 0
    # Batch and past are the dynamic ones; a static batch is left out all the same.
    static = [dim for dim in value.shape[1:] if isinstance(dim, int)]
    return math.ceil(math.prod(static) * value.dtype.itemsize)


def _vocabulary(model: ir.Model) -> int | None:
    for value in model.graph.inputs:
        if value.name in ("input_ids", "decoder_input_ids"):
            tables = (node.inputs[0] for node in value.consumers() if node.op_type == "Gather")
            for table in tables:
                if table is not None and table.const_value is not None:
                    return table.const_value.shape.numpy()[0]
    return None
