"""Puts a model into a Triton model repository."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
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
from exporter.progress import QUIET, Progress
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


def package_triton(
    source: Path, repository: Path, *, name: str | None = None, device: Device = "gpu",
    instances: int = 1, max_batch: int = MAX_BATCH, progress: Progress = QUIET,
) -> Path:  # fmt: skip
    """Puts a model into a Triton model repository, for the TensorRT or ONNX Runtime backend."""
    source = _file_of(source)
    name = source.parent.resolve().name if name is None else name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise PackagingError(
            f"{name!r} is not a valid name of a model.",
            "Give it one with --name: letters, digits, - and _.",
        )
    if (repository / name).exists() and not (repository / name / _CONFIG).is_file():
        raise PackagingError(
            f"{repository / name} exists and is not a Triton model.", "Choose another --name."
        )
    if source.resolve().is_relative_to((repository / name).resolve()):
        raise UsageError(
            f"{source} belongs to {repository / name}, which would be replaced.",
            "Choose another --name.",
        )
    with staged_directory(repository / name) as stage:
        version = stage / _VERSION
        version.mkdir()
        if source.suffix == ".onnx":
            lines, group = _onnx_model(source, version, max_batch), f"KIND_{device.upper()}"
        else:
            lines, group = _engine_model(source, version, device, progress)
        lines = [f"name: {_quoted(name)}", *lines]
        lines.append(f"instance_group {{ count: {instances} kind: {group} }}")
        (stage / _CONFIG).write_text("\n".join(lines) + "\n", encoding="utf-8")
        for beside in _TRITON_BESIDE:  # for clients; Triton passes them over
            if (source.parent / beside).exists():
                copy_file(source.parent / beside, stage / beside)
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


def _refuse_decoder(source: Path, inputs: Sequence[EngineTensor]) -> None:
    if any(CACHE_INPUT.fullmatch(tensor.name) for tensor in inputs):
        raise PackagingError(
            f"{source} is a decoder with a KV cache, which Triton would send with each request.",
            "Run it with onnxruntime-genai (depthcut export --target onnxruntime-cuda) or depthcut "
            "generate; where the plan drops whole blocks, serve its checkpoint (depthcut "
            "checkpoint) with vLLM or TensorRT-LLM, for which Triton has backends.",
            code="decoder",
        )


def _onnx_model(source: Path, version: Path, max_batch: int) -> list[str]:
    """Copies an ONNX file; gives the lines of its config."""
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
    return _config_lines("onnxruntime", "model.onnx", inputs, outputs, batch)


def _free_first(*ends: Sequence[EngineTensor]) -> bool:
    """Whether the first size of every tensor is free, as a batch's is."""
    return all(tensor.shape[:1] == (-1,) for tensors in ends for tensor in tensors)


def _engine_model(
    source: Path, version: Path, device: Device, progress: Progress
) -> tuple[list[str], str]:
    """Copies an engine and its record; gives the lines of its config, and where it runs."""
    record = read_sidecar(source)
    _refuse_decoder(source, record.inputs)
    if record.backend != "tensorrt":
        raise PackagingError(
            f"{source.name} is an engine of {record.backend}, for which Triton has no backend.",
            "Package the ONNX file, or build on the card that serves: depthcut build --engine "
            "tensorrt.",
        )
    if device == "cpu":
        raise PackagingError("An engine runs on a GPU only.", "Leave --device cpu out.")
    refuse_wrong([record])
    if (check := record.check) is None:
        progress.say(f"{source.name}: not checked against ONNX Runtime")
    copy_file(source, version / "model.plan", named=True)
    copy_file(sidecar_path(source), version / "model.plan.json")
    sizes, ends = _batches(record), (record.inputs, record.outputs)
    notes = {
        "depthcut.profiles": ",".join(entry.phase for entry in record.profiles),
        "depthcut.engine_sha256": record.engine_sha256,
        "depthcut.check": "not checked"
        if check is None
        else f"off by {check.error:.2g}, {check.card}",
    }
    lines = [
        *_config_lines("tensorrt", "model.plan", *ends, max(sizes, default=0), sizes),
        *(
            f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(note)} }} }}"
            for key, note in notes.items()
        ),
    ]
    numbers = (f' profile: "{number}"' for number in range(len(record.profiles)))
    return lines, f"KIND_GPU{''.join(numbers)}"


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


def _config_lines(
    backend: str,
    file: str,
    inputs: Sequence[EngineTensor],
    outputs: Sequence[EngineTensor],
    batch: int,
    preferred: Sequence[int] = (),
) -> list[str]:
    """What the config says of a model.

    Triton puts waiting requests of one shape together; the batch's size is then left out of each
    tensor's shape. An engine names the sizes that its kernels were chosen for.
    """
    lines = [
        f"backend: {_quoted(backend)}",
        f"default_model_filename: {_quoted(file)}",
        f"max_batch_size: {batch}",
    ]
    if batch:
        sizes = ", ".join(map(str, preferred))
        lines.append(
            f"dynamic_batching {{ {f'preferred_batch_size: [ {sizes} ] ' if sizes else ''}}}"
        )
    for what, tensors in (("input", inputs), ("output", outputs)):
        for tensor in tensors:
            if tensor.dtype not in _TYPES:
                raise PackagingError(
                    f"Triton has no type for {tensor.name!r}, which is {tensor.dtype}."
                )
            dims = ", ".join(map(str, tensor.shape[1:] if batch else tensor.shape))
            lines.append(
                f"{what} {{ name: {_quoted(tensor.name)} data_type: {_TYPES[tensor.dtype]} "
                f"dims: [ {dims} ] }}"
            )
    return lines


def _quoted(text: str) -> str:
    return json.dumps(text)
