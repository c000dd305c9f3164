"""A Triton model repository with one model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from exporter.engines.build.engine_set import find_engines
from exporter.engines.build.profiles import graph_inputs, graph_outputs
from exporter.engines.build.sidecar import EngineRecord, EngineTensor, read_sidecar, sidecar_path
from exporter.errors import PackagingError, UsageError
from exporter.files import staged_directory
from graph_passes.files.reading import copy_file
from graph_passes.files.storage import data_files, load_model

Device = Literal["gpu", "cpu"]

_CONFIG, _VERSION = "config.pbtxt", "1"
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")
_TYPES = {
    "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64", "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32",
    "int64": "TYPE_INT64", "float16": "TYPE_FP16", "half": "TYPE_FP16", "float32": "TYPE_FP32",
    "float": "TYPE_FP32", "float64": "TYPE_FP64", "double": "TYPE_FP64", "bfloat16": "TYPE_BF16",
    "bf16": "TYPE_BF16",
}  # fmt: skip


@dataclass(frozen=True)
class TritonModel:
    """What the config says.

    Attributes:
        name: The model's name, which its folder has too.
        backend: Triton's backend.
        file: What the backend loads in the version's folder.
        inputs: All of them, caches included; -1 stands for a free size, the batch's included.
        outputs: All of them.
        device: Where instances run.
        instances: How many.
        profiles: TensorRT: the engine's optimisation profiles, by number.
        parameters: Notes for whoever reads the config.
    """

    name: str
    backend: Literal["onnxruntime", "tensorrt"]
    file: str
    inputs: Sequence[EngineTensor]
    outputs: Sequence[EngineTensor]
    device: Device = "gpu"
    instances: int = 1
    profiles: int = 0
    parameters: tuple[tuple[str, str], ...] = ()


def package_triton(
    source: Path, repository: Path, *, name: str | None = None, device: Device = "gpu",
    instances: int = 1,
) -> Path:  # fmt: skip
    """Puts a model into a Triton model repository, for the TensorRT or ONNX Runtime backend.

    Args:
        source: An engine with its record or the folder of one, or an ONNX file.
        repository: The repository's folder, which may hold other models.
        name: The model's name; by default that of the source's folder.
        device: Where Triton runs it.
        instances: How many instances.

    Returns:
        The model's folder in the repository. An earlier one of that name is replaced at once.

    Raises:
        PackagingError: The engine is TensorRT-RTX's, which Triton has no backend for; the folder
            holds an engine for each phase; the name is none; or a type is unknown to Triton.
        UsageError: The model would replace its source.
        EngineError: The engine and its record don't belong together.
        OnnxFileError: The ONNX file can't be read.
    """
    source = _file_of(source)
    name = source.parent.resolve().name if name is None else name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise PackagingError(
            f"{name!r} is not a valid name of a model.",
            "Give it one with --name: letters, digits, - and _.",
        )
    _refuse_foreign(repository / name)
    _refuse_within(repository / name, source)
    with staged_directory(repository / name) as stage:
        version = stage / _VERSION
        version.mkdir()
        if source.suffix == ".onnx":
            model = _onnx_model(source, version, name, device, instances)
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


def _refuse_within(folder: Path, source: Path) -> None:
    """Inputs are never changed: a model that is to be replaced can't be the source."""
    if source.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"{source} belongs to {folder}, which would be replaced.", "Choose another --name."
        )


def _onnx_model(
    source: Path, version: Path, name: str, device: Device, instances: int
) -> TritonModel:
    data = data_files(load_model(source))
    # A model of several files stands in a folder of the model's name, and is called so there.
    home = version / "model.onnx" if data else version
    home.mkdir(exist_ok=True)
    copy_file(source, home / "model.onnx", named=True)
    for file in data:
        target = home / file.relative_to(source.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(file, target, source.parent)
    inputs, outputs = (
        [EngineTensor.of(spec) for spec in specs]
        for specs in (graph_inputs(source), graph_outputs(source))
    )
    return TritonModel(name, "onnxruntime", "model.onnx", inputs, outputs, device, instances)


def _engine_model(
    source: Path, version: Path, name: str, device: Device, instances: int
) -> TritonModel:
    record = read_sidecar(source)
    if record.backend != "tensorrt":
        raise PackagingError(
            f"{source.name} is an engine of {record.backend}, for which Triton has no backend.",
            "Package the ONNX file, or build on the card that serves: depthcut build --engine "
            "tensorrt.",
        )
    if device == "cpu":
        raise PackagingError("An engine runs on a GPU only.", "Leave --device cpu out.")
    copy_file(source, version / "model.plan", named=True)
    copy_file(sidecar_path(source), version / "model.plan.json")
    return TritonModel(
        name, "tensorrt", "model.plan", record.inputs, record.outputs,
        "gpu", instances, len(record.profiles), _notes(record),
    )  # fmt: skip


def _notes(record: EngineRecord) -> tuple[tuple[str, str], ...]:
    phases = ",".join(entry.phase for entry in record.profiles)
    return (("depthcut.profiles", phases), ("depthcut.engine_sha256", record.engine_sha256))


def _copy_beside(source: Path, stage: Path) -> None:
    """The tokenizer and configs, for clients; Triton passes them over."""
    for name in _BESIDE:
        if (source.parent / name).exists():
            copy_file(source.parent / name, stage / name)


def triton_config(model: TritonModel) -> str:
    """Writes the config.

    ``max_batch_size`` is 0: the sizes of mask and cache differ from input to input, so each tensor
    tells its whole shape, and Triton doesn't batch requests.

    Raises:
        PackagingError: A tensor has a type that Triton doesn't know.
    """
    lines = [
        f"name: {_quoted(model.name)}",
        f"backend: {_quoted(model.backend)}",
        f"default_model_filename: {_quoted(model.file)}",
        "max_batch_size: 0",
        *(_tensor("input", tensor) for tensor in model.inputs),
        *(_tensor("output", tensor) for tensor in model.outputs),
        _instances(model),
    ]
    for key, value in model.parameters:
        lines.append(
            f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
        )
    return "\n".join(lines) + "\n"


def _tensor(what: str, tensor: EngineTensor) -> str:
    if tensor.dtype not in _TYPES:
        raise PackagingError(f"Triton has no type for {tensor.name!r}, which is {tensor.dtype}.")
    dims = ", ".join(map(str, tensor.shape))
    fields = f"name: {_quoted(tensor.name)} data_type: {_TYPES[tensor.dtype]} dims: [ {dims} ]"
    return f"{what} {{ {fields} }}"


def _instances(model: TritonModel) -> str:
    profiles = "".join(f' profile: "{number}"' for number in range(model.profiles))
    kind = f"kind: KIND_{model.device.upper()}"
    return f"instance_group {{ count: {model.instances} {kind}{profiles} }}"


def _quoted(text: str) -> str:
    return json.dumps(text)
