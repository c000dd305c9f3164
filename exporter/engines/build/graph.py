"""What an ONNX file tells about the engine that it will become."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.engines.build.profiles import input_tensors
from exporter.engines.tensors import TensorSpec
from exporter.files import sha256_file, sha256_files
from graph_passes.files.storage import data_files, load_model
from graph_passes.plan_record import recorded_replacements

_FLOATS = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}


@dataclass(frozen=True)
class EngineSource:
    """A graph that an engine is built from.

    Attributes:
        precision: The float type of most of its weights: ``fp32``, ``fp16``, ``bf16``; with
            ``int8``, ``int4`` or ``fp8`` behind it where weights are quantised.
        plan: What was cut out of it, from its metadata; an unreadable record counts as none.
        operators: Each operator, its domain before it, and the names of the nodes that use it; a
            node without one has its place in the graph, as the parsers tell it: ``number 7``.
        inputs: What it declares to be fed.
        weights: The files beside it that hold its weights.
    """

    precision: str
    plan: list[dict[str, Any]]
    operators: dict[str, list[str]]
    inputs: tuple[TensorSpec, ...]
    weights: tuple[Path, ...]


def read_source(path: Path) -> EngineSource:
    """Reads a graph without its weights.

    Raises:
        OnnxFileError: The file can't be read.
        EngineError: An input declares no shape or no type.
    """
    model = load_model(path)
    operators: dict[str, list[str]] = {}
    numbers = {node: f"number {place}" for place, node in enumerate(model.graph)}
    for node in model.graph.all_nodes():
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        operators.setdefault(name, []).append(node.name or numbers.get(node, ""))
    plan: list[dict[str, Any]] = [
        {"kind": ref.kind, "layer": ref.layer, "replacement": found.kind}
        for ref, found in sorted(recorded_replacements(model).items())
    ]
    return EngineSource(
        precision=_precision(model),
        plan=plan,
        operators=operators,
        inputs=tuple(input_tensors(path, model)),
        weights=tuple(data_files(model)),
    )


def graph_hashes(path: Path, source: EngineSource) -> dict[str, str]:
    """What an engine's record says that it was made from: the graph's file, and its weights'."""
    hashes = {"model": sha256_file(path)}
    if source.weights:
        hashes["weights"] = sha256_files(source.weights, path.parent)
    return hashes


def _precision(model: Any) -> str:
    sizes: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            sizes[value.const_value.dtype.name] += value.const_value.size
    floats = {_FLOATS[name]: size for name, size in sizes.items() if name in _FLOATS}
    main = max(floats, key=floats.__getitem__, default="fp32")
    quantised = [name for name in ("INT4", "UINT4", "INT8", "UINT8", "FLOAT8E4M3FN") if sizes[name]]
    most = max(quantised, key=sizes.__getitem__, default="")
    if not most or sizes[most] * 2 < sum(floats.values()):
        return main
    return f"{main}-{'fp8' if most.startswith('FLOAT8') else most.lower().lstrip('u')}"
