"""Weights that the masked oracle takes from elsewhere than the model's files: replacements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir

if TYPE_CHECKING:
    import onnx_ir as ir

_ELSEWHERE = "given.in.memory"


def set_apart(model: ir.Model, runtime: Any) -> dict[str, Any]:
    """Takes tensors that are read when asked for out of a model, which then declares them external.

    Inside, they could make it larger than the 2 GB that a message may have.

    Args:
        model: The model; its initializers are changed.
        runtime: The module ``onnxruntime``.

    Returns:
        By name, what a session of the model must be given: ``OrtValue`` s.
    """
    values = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, onnx_ir.LazyTensor):
            values[name] = _runtime_value(tensor, runtime)
            shape = onnx_ir.Shape(tensor.shape.numpy())
            value.const_value = onnx_ir.ExternalTensor(
                _ELSEWHERE, 0, tensor.nbytes, tensor.dtype, shape=shape, name=name
            )
    return values


def _runtime_value(tensor: ir.TensorProtocol, runtime: Any) -> Any:
    array = tensor.numpy()
    if tensor.dtype == onnx_ir.DataType.BFLOAT16:  # numpy has none, so its bits go
        make = runtime.OrtValue.ortvalue_from_numpy_with_onnx_type
        return make(array.view(np.uint16), tensor.dtype.value)
    whole = np.ascontiguousarray(array).reshape(array.shape)  # it gives a scalar an axis
    return runtime.OrtValue.ortvalue_from_numpy(whole)


def relocated(graph_file: Path, weights_folder: Path) -> bytes:
    """A staged graph's bytes, with data files beside it named as seen from another folder.

    A session reads from one folder only, so the new weights of a graph that shares the others are
    named by their way from there.

    Args:
        graph_file: The graph.
        weights_folder: The folder that a session will read from.
    """
    if graph_file.parent == weights_folder:
        return graph_file.read_bytes()
    proto = onnx.load_model(graph_file, load_external_data=False)
    own = {path.name for path in graph_file.parent.iterdir() if path != graph_file}
    for tensor in proto.graph.initializer:
        _relocate(tensor, own, graph_file.parent, weights_folder)
    data: bytes = proto.SerializeToString()
    return data


def _relocate(tensor: onnx.TensorProto, own: set[str], folder: Path, seen_from: Path) -> None:
    for entry in tensor.external_data:
        if entry.key == "location" and entry.value in own:
            way = folder.resolve().relative_to(seen_from.resolve())
            entry.value = (way / entry.value).as_posix()
