"""Puts a model into a Triton model repository."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from exporter.engines.build.engine_set import (
    EngineRecord,
    EngineTensor,
    find_engines,
    read_sidecar,
    refuse_wrong,
    sidecar_path,
)
from exporter.engines.build.profiles import graph_inputs, graph_outputs
from exporter.errors import PackagingError, UsageError
from exporter.files import staged_directory
from exporter.models.graph_facts import CACHE_INPUT
from graph_passes.files.reading import copy_file
from graph_passes.files.storage import data_files, load_model

Device = Literal["gpu", "cpu"]

MAX_BATCH = 32
"""The largest batch that Triton makes of requests, where nobody says."""

_CONFIG, _VERSION = "config.pbtxt", "1"
_TRITON_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
)
_TYPES = {
    "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64", "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32",
    "int64": "TYPE_INT64", "float16": "TYPE_FP16", "half": "TYPE_FP16", "float32": "TYPE_FP32",
    "float": "TYPE_FP32", "float64": "TYPE_FP64", "double": "TYPE_FP64", "bfloat16": "TYPE_BF16",
    "bf16": "TYPE_BF16",
}  # fmt: skip


@dataclass(frozen=True)
class TritonModel:
    """What the config says."""

    name: str
    backend: Literal["onnxruntime", "tensorrt"]
    file: str
    inputs: Sequence[EngineTensor]
    outputs: Sequence[EngineTensor]
    device: Device = "gpu"
    instances: int = 1
    batch: int = 0
    preferred: tuple[int, ...] = ()
    profiles: int = 0
    parameters: tuple[tuple[str, str], ...] = ()


def package_triton(
    source: Path, repository: Path, *, name: str | None = None, device: Device = "gpu",
    instances: int = 1, max_batch: int = MAX_BATCH,
) -> Path:  # fmt: skip
    """Puts a model into a Triton model repository, for the TensorRT or ONNX Runtime backend."""
    source = _file_of(source)
    name = source.parent.resolve().name if name is None else name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise PackagingError(
            f"{name!r} is not a valid name of a model.",
            "Give it one with --name: letters, digits, - and _.",
        )
    _refuse_foreign(repository / name)
    if source.resolve().is_relative_to((repository / name).resolve()):
        raise UsageError(
            f"{source} belongs to {repository / name}, which would be replaced.",
            "Choose another --name.",
        )
    with staged_directory(repository / name) as stage:
        version = stage / _VERSION
        version.mkdir()
        if source.suffix == ".onnx":
            model = _onnx_model(source, version, name, device, instances, max_batch)
        else:
            model = _engine_model(source, version, name, device, instances)
        (stage / _CONFIG).write_text(triton_config(model), encoding="utf-8")
        _copy_beside(source, stage)
    return repository / name


def _file_of(source: Path) -> Path:
    if not source.is_dir():
        return source
    paths = find_engines(source).paths
    if len(paths) > 1:
        raise PackagingError(
            f"Triton takes one file as a model, and {source} holds {len(paths)} engines.",
            "Name one of them, or build one for all phases: depthcut build without --split.",
        )
    return paths[0]


def _refuse_foreign(folder: Path) -> None:
    """Keeps a folder that is no model of Triton's from being replaced."""
    if folder.exists() and not (folder / _CONFIG).is_file():
        raise PackagingError(
            f"{folder} exists and is not a Triton model.", "Choose another --name."
        )


def _refuse_decoder(source: Path, inputs: Sequence[EngineTensor]) -> None:
    if any(CACHE_INPUT.fullmatch(tensor.name) for tensor in inputs):
        raise PackagingError(
            f"{source} is a decoder with a KV cache, which Triton would send with each request.",
            "Run it with onnxruntime-genai (depthcut export --target onnxruntime-cuda) or depthcut "
            "generate; where the plan drops whole blocks, serve its checkpoint (depthcut "
            "checkpoint) with vLLM or TensorRT-LLM, for which Triton has backends.",
            code="decoder",
        )


def _onnx_model(
    source: Path, version: Path, name: str, device: Device, instances: int, max_batch: int
) -> TritonModel:
    specs = graph_inputs(source)
    inputs, outputs = (
        [EngineTensor.of(spec) for spec in ends] for ends in (specs, graph_outputs(source))
    )
    _refuse_decoder(source, inputs)
    batches = len({spec.shape[:1] for spec in specs}) == 1 and _free_first(inputs, outputs)
    data = data_files(load_model(source))
    # A model of several files stands in a folder of the model's name, and is called so there.
    home = version / "model.onnx" if data else version
    home.mkdir(exist_ok=True)
    copy_file(source, home / "model.onnx", named=True)
    for file in data:
        target = home / file.relative_to(source.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(file, target, source.parent)
    batch = max_batch if batches and max_batch > 1 else 0
    return TritonModel(name, "onnxruntime", "model.onnx", inputs, outputs, device, instances, batch)


def _free_first(*ends: Sequence[EngineTensor]) -> bool:
    """Whether the first size of every tensor is free, as a batch's is."""
    return all(tensor.shape[:1] == (-1,) for tensors in ends for tensor in tensors)


def _engine_model(
    source: Path, version: Path, name: str, device: Device, instances: int
) -> TritonModel:
    record = read_sidecar(source)
    _refuse_decoder(source, record.inputs)
    if record.backend != "tensorrt":
        raise PackagingError(
            f"{source.name} is an engine of {record.backend}, for which Triton has no backend.",
            "Package the ONNX file, or build on the card that serves: depthcut build --engine "
            "tensorrt.",
        )
    refuse_wrong([record])
    if device == "cpu":
        raise PackagingError("An engine runs on a GPU only.", "Leave --device cpu out.")
    copy_file(source, version / "model.plan", named=True)
    copy_file(sidecar_path(source), version / "model.plan.json")
    preferred, phases = _batches(record), ",".join(entry.phase for entry in record.profiles)
    return TritonModel(
        name, "tensorrt", "model.plan", record.inputs, record.outputs,
        "gpu", instances, max(preferred, default=0), preferred, len(record.profiles),
        (("depthcut.profiles", phases), ("depthcut.engine_sha256", record.engine_sha256)),
    )  # fmt: skip


def _batches(record: EngineRecord) -> tuple[int, ...]:
    """The usual and the largest batch that an engine serves; none where it serves one size alone.

    Triton makes batches of any size up to the largest, so the smallest must be 1.
    """
    spans = [shape for profile in record.profiles for shape in profile.shapes.values()]
    sizes = {(span.low[0], span.usual[0], span.high[0]) for span in spans if span.low}
    if len(sizes) != 1 or not _free_first(record.inputs, record.outputs):
        return ()
    low, usual, high = sizes.pop()
    return tuple(sorted({usual, high} - {1})) if low == 1 < high else ()


def _copy_beside(source: Path, stage: Path) -> None:
    """The tokenizer and configs, for clients; Triton passes them over."""
    for name in _TRITON_BESIDE:
        if (source.parent / name).exists():
            copy_file(source.parent / name, stage / name)


def triton_config(model: TritonModel) -> str:
    """Writes the config.

    Triton puts waiting requests of one shape together; the batch's size is then left out of each
    tensor's shape. An engine names the sizes that its kernels were chosen for.
    """
    sizes = ", ".join(map(str, model.preferred))
    preferred = f"preferred_batch_size: [ {sizes} ] " if sizes else ""
    kind = f"kind: KIND_{model.device.upper()}"
    profiles = "".join(f' profile: "{number}"' for number in range(model.profiles))
    lines = [
        f"name: {_quoted(model.name)}",
        f"backend: {_quoted(model.backend)}",
        f"default_model_filename: {_quoted(model.file)}",
        f"max_batch_size: {model.batch}",
        *([f"dynamic_batching {{ {preferred}}}"] if model.batch else []),
        *(_tensor("input", tensor, model) for tensor in model.inputs),
        *(_tensor("output", tensor, model) for tensor in model.outputs),
        f"instance_group {{ count: {model.instances} {kind}{profiles} }}",
    ]
    for key, value in model.parameters:
        lines.append(
            f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
        )
    return "\n".join(lines) + "\n"


def _tensor(what: str, tensor: EngineTensor, model: TritonModel) -> str:
    if tensor.dtype not in _TYPES:
        raise PackagingError(f"Triton has no type for {tensor.name!r}, which is {tensor.dtype}.")
    dims = ", ".join(map(str, tensor.shape[1:] if model.batch else tensor.shape))
    fields = f"name: {_quoted(tensor.name)} data_type: {_TYPES[tensor.dtype]} dims: [ {dims} ]"
    return f"{what} {{ {fields} }}"


def _quoted(text: str) -> str:
    return json.dumps(text)
