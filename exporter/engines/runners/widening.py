"""A bfloat16 graph in float32: ONNX Runtime's CPU has hardly a kernel for it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # numpy knows bfloat16 from its import on
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.files import scratch_folder
from graph_passes.files.storage import load_model, save_model
from graph_passes.replacements import array_of

Arrays = Mapping[str, NDArray[Any]]

_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "softmax_precision"})


def has_bfloat16(model: ir.Model) -> bool:
    """Whether a value, a weight or a constant of a graph is bfloat16; no weight is read."""
    narrow = ir.DataType.BFLOAT16
    if any(value.dtype == narrow for value in _values(model)):
        return True
    return any(
        attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == narrow
        for node in model.graph.all_nodes()
        for attribute in node.attributes.values()
    )


def in_float32(model: ir.Model) -> ir.Model:
    """The same graph with float32 in the place of bfloat16.

    What a cut leaves out or joins wrongly shows just as well; the graph's own rounding does not.

    Returns:
        A copy of which the widened weights are read when they are asked for.
    """
    copy = model.clone()
    for node in copy.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR:
                node.attributes[name] = ir.AttrTensor(name, _widened(attribute.as_tensor()))
            elif name in _TYPE_ATTRIBUTES and attribute.value == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT.value)
    for value in _values(copy):
        if value.dtype == ir.DataType.BFLOAT16:
            value.type = ir.TensorType(ir.DataType.FLOAT)  # the two models share the old one
        if value.const_value is not None:
            value.const_value = _widened(value.const_value)
    return copy


def widened_arrays(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Arrays for such a copy."""
    return {
        name: array.astype(np.float32) if array.dtype.name == "bfloat16" else array
        for name, array in arrays.items()
    }


def narrowed_arrays(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """What such a copy gives, as far as bfloat16 would tell it."""
    return {
        name: array.astype(np.dtype("bfloat16")) if array.dtype == np.float32 else array
        for name, array in arrays.items()
    }


def loaded(graph: bytes, weights_folder: Path) -> ir.Model:
    """A serialised model of which the data files lie in a folder."""
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(graph))
    ir.external_data.set_base_dir(model.graph, weights_folder)
    return model


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from graph.inputs
        yield from graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype != ir.DataType.BFLOAT16:
        return tensor
    shape = ir.Shape(tensor.shape.numpy())
    read = partial(_read, tensor)
    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=shape, name=tensor.name)


def _read(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(array_of(tensor).astype(np.float32), name=tensor.name)


class WidenedCopy:
    """A copy in a folder of its own, which goes when nobody holds the copy any more.

    Args:
        model: The ONNX file; its weights go into the copy in float32, at twice their size.
        beside: Puts that folder beside the file, and not where temporary files are, which may be
            small or memory.

    Attributes:
        file: The copy.

    Raises:
        OnnxFileError: The file can't be read, or the disk is full.
    """

    def __init__(self, model: Path, *, beside: bool = False) -> None:
        leave = contextlib.ExitStack()
        self._gone = weakref.finalize(self, leave.close)
        self.file = leave.enter_context(_folder(model if beside else None)) / "model.onnx"
        save_model(in_float32(load_model(model)), self.file)

    def __enter__(self) -> Path:
        """The copy's path."""
        return self.file

    def __exit__(self, *exc_info: object) -> None:
        """Removes the copy."""
        self._gone()


@contextlib.contextmanager
def _folder(beside: Path | None) -> Iterator[Path]:
    if beside is None:
        with scratch_folder("float32") as folder:
            yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix=".depthcut.", dir=beside.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_bfloat16(model: Path) -> bool:
    """Whether anything in an ONNX file is bfloat16.

    Raises:
        OnnxFileError: The file can't be read.
    """
    return has_bfloat16(load_model(model))
