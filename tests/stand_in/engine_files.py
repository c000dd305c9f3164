"""Engines of the stand-in: files that name the graph which they compute."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporter.engines.build.build import DECOMPOSABLE, Adapted, adapt
from exporter.engines.build.engine_set import EngineRecord, EngineTensor, sidecar_path
from exporter.engines.build.profiles import Ranges, fitting, graph_inputs, graph_outputs, profile
from exporter.engines.build.settings import BuildSettings, Logits, Phase
from exporter.engines.tensors import numpy_dtype
from exporter.files import sha256_file, sha256_files
from exporter.models.graph_facts import read_facts
from graph_passes.files.storage import data_files, load_model
from tests.engine_support import record
from tests.stand_in.faults import Fault, in_graph

VERSIONS = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}


@dataclass(frozen=True)
class EngineFile:
    """What such a file says."""

    onnx: str
    phases: list[Phase]
    profiles: list[dict[str, list[list[int]]]]
    logits: Logits = "last"
    weights_bytes: int = 1 << 16
    scratch_bytes: int = 1 << 12
    kernels: int = 8
    capturable: bool = True
    fault: Fault = ""

    def built(self, fault: Fault = "") -> tuple[Path, Adapted]:
        """The graph that the builder is given, and what was changed for it."""
        onnx = Path(self.onnx)
        return _built(onnx, onnx.stat().st_mtime_ns, tuple(self.phases), self.logits, fault)


@cache
def _built(
    onnx: Path, changed: int, phases: tuple[Phase, ...], logits: Logits, fault: Fault
) -> tuple[Path, Adapted]:
    model = load_model(onnx)
    adapted = adapt(model, BuildSettings(logits=logits), phases)
    for node in model.graph.all_nodes():
        node.attributes.pop(DECOMPOSABLE, None)  # TensorRT's parser alone knows it
    target = onnx.with_name("-".join([onnx.name, *phases, logits, fault, f"{changed}.built"]))
    target.write_bytes(ir.to_proto(in_graph(model, fault)).SerializeToString())
    return target, adapted


def write_engine(
    onnx: Path,
    engine: Path,
    phases: Sequence[Phase],
    ranges: Ranges,
    *,
    backend: str = "tensorrt-rtx",
    settings: BuildSettings | None = None,
    **facts: Any,
) -> Path:
    """An engine of a graph and its record; gives its path."""
    inputs = graph_inputs(onnx)
    entries = [profile(inputs, phase, fitting(inputs, ranges)) for phase in phases]
    shapes = [
        {name: [list(span.low), list(span.high)] for name, span in entry.shapes.items()}
        for entry in entries
    ]
    engine.parent.mkdir(parents=True, exist_ok=True)
    settings = settings or BuildSettings()
    file = EngineFile(str(onnx), list(phases), shapes, settings.logits, **facts)
    engine.write_text(json.dumps(asdict(file)))
    graph, adapted = file.built()
    outputs = graph_outputs(graph)
    precision = read_facts(onnx).precision
    given, made = ([EngineTensor.of(spec) for spec in ends] for ends in (inputs, outputs))
    weights = data_files(load_model(onnx))
    hashes = {"model": sha256_file(onnx)}
    hashes |= {"weights": sha256_files(weights, onnx.parent)} if weights else {}
    record(
        engine=engine.name, engine_sha256=sha256_file(engine),
        engine_bytes=engine.stat().st_size, backend=backend, backend_version=VERSIONS[backend],
        built_on={"compute_capability": "sm89"} if backend == "tensorrt" else {},
        settings=settings, precision=precision, profiles=entries,
        inputs=given, outputs=made, made_from=hashes, attention=adapted.attention,
        logits=adapted.logits,
    ).write(sidecar_path(engine))  # fmt: skip
    return engine


def altered(engine: Path, **facts: Any) -> Path:
    """The same engine with other facts, and a record that knows it."""
    engine.write_text(json.dumps({**json.loads(engine.read_text()), **facts}))
    changes = {"engine_sha256": sha256_file(engine), "engine_bytes": engine.stat().st_size}
    known = EngineRecord.read(sidecar_path(engine))
    known.model_copy(update={**changes, "check": None}).write(sidecar_path(engine))
    return engine


def read_engine(content: bytes) -> EngineFile | None:
    """The file's facts; None where it is no engine."""
    try:
        return EngineFile(**json.loads(content))
    except (ValueError, TypeError):
        return None


@dataclass(frozen=True)
class GraphEnds:
    """What goes into a graph and comes out."""

    inputs: dict[str, tuple[Any, tuple[Any, ...]]]
    outputs: dict[str, tuple[Any, tuple[Any, ...]]]
    aliases: dict[str, str]

    @property
    def tensors(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Both."""
        return {**self.inputs, **self.outputs}

    @classmethod
    def of(cls, onnx: Path) -> GraphEnds:
        """Those of a graph; what a TensorScatter writes is aliased with what it writes into."""
        return cls._read(onnx, onnx.stat().st_mtime_ns)

    @classmethod
    @cache
    def _read(cls, onnx: Path, _changed: int) -> GraphEnds:
        ends = [
            {spec.name: (numpy_dtype(spec.dtype.name), spec.shape) for spec in specs}
            for specs in (graph_inputs(onnx), graph_outputs(onnx))
        ]
        scatters = [node for node in load_model(onnx).graph if node.op_type == "TensorScatter"]
        aliases = {str(n.outputs[0].name): str(n.inputs[0].name) for n in scatters if n.inputs[0]}
        return cls(ends[0], ends[1], aliases)

    def output_shape(self, name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """An output's shape at the inputs'; -1 for what they don't tell."""
        sizes: dict[Any, int] = {}
        for given, (_, dims) in self.inputs.items():
            sizes.update(zip(dims, shapes[given], strict=True))
        values = [d if isinstance(d, int) else sizes.get(d, -1) for d in self.outputs[name][1]]
        if name.startswith("present") and values[2] < 0:
            past = name.replace("present", "past_key_values")
            values[2] = shapes[past][2] + shapes["input_ids"][1]
        return tuple(values)
