"""The text of a Triton ``config.pbtxt``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from exporter.errors import PackagingError

_TYPES = {
    "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64", "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32",
    "int64": "TYPE_INT64", "float16": "TYPE_FP16", "half": "TYPE_FP16", "float32": "TYPE_FP32",
    "float": "TYPE_FP32", "float64": "TYPE_FP64", "double": "TYPE_FP64", "bfloat16": "TYPE_BF16",
    "bf16": "TYPE_BF16",
}  # fmt: skip


@dataclass(frozen=True)
class TritonTensor:
    """An input or output; -1 stands for a free size, the batch's included."""

    name: str
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class TritonModel:
    """What the config says.

    Attributes:
        name: The model's name, which its folder has too.
        backend: Triton's backend.
        file: What the backend loads in the version's folder.
        inputs: All of them, caches included.
        outputs: All of them.
        device: Where instances run.
        instances: How many.
        profiles: TensorRT: the engine's optimisation profiles, by number.
        parameters: Notes for whoever reads the config.
    """

    name: str
    backend: Literal["onnxruntime", "tensorrt"]
    file: str
    inputs: Sequence[TritonTensor]
    outputs: Sequence[TritonTensor]
    device: Literal["gpu", "cpu"] = "gpu"
    instances: int = 1
    profiles: int = 0
    parameters: tuple[tuple[str, str], ...] = ()


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


def _tensor(what: str, tensor: TritonTensor) -> str:
    if tensor.dtype not in _TYPES:
        raise PackagingError(f"Triton has no type for {tensor.name!r}, which is {tensor.dtype}.")
    dims = ", ".join(map(str, tensor.dims))
    fields = f"name: {_quoted(tensor.name)} data_type: {_TYPES[tensor.dtype]} dims: [ {dims} ]"
    return f"{what} {{ {fields} }}"


def _instances(model: TritonModel) -> str:
    profiles = "".join(f' profile: "{number}"' for number in range(model.profiles))
    kind = f"kind: KIND_{model.device.upper()}"
    return f"instance_group {{ count: {model.instances} {kind}{profiles} }}"


def _quoted(text: str) -> str:
    return json.dumps(text)
