"""What an ONNX file must be like to be read, and who else in its folder reads its weights."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from graph_passes.errors import OnnxFileError, UnsafeInputError, UnsafeOnnxFileError
from graph_passes.files.locations import may_lie_at, real
from graph_passes.files.reading import opened, read_bytes

_BLOCK_BYTES = 512  # what st_blocks counts, on every file system
_MOST_BEHIND_BYTES = 1 << 30
AGAIN = "It may be cut off: export or copy it again."


def refuse_unsupported(path: Path, proto: onnx.ModelProto) -> None:
    """Refuses what would be lost on the way, and what no runtime could make sense of."""
    if not proto.opset_import:
        raise OnnxFileError(
            f"{path} declares no opset (opset_import).", "Export it again.", code="invalid-onnx"
        )
    if proto.training_info:
        raise OnnxFileError(
            f"{path} holds training information, which depthcut can't keep.",
            "Export the model for inference.",
            code="invalid-onnx",
        )
    if any(graph.sparse_initializer for graph in _graphs(proto.graph)):
        raise OnnxFileError(
            f"{path} holds sparse weights (sparse_initializer), which depthcut can't keep.",
            "Store them densely.",
            code="invalid-onnx",
        )
    for graph in _graphs(proto.graph):
        for tensor in graph.initializer:
            if tensor.data_type == onnx.TensorProto.UNDEFINED:
                raise OnnxFileError(f"{path}: the weight {tensor.name!r} has no type.", AGAIN)
        for node in graph.node:
            if any(attribute.ref_attr_name for attribute in node.attribute):
                raise OnnxFileError(
                    f"{path}: the node {node.name!r} refers to an attribute of a function, but "
                    "stands in none.",
                    AGAIN,
                )
        for text in _texts(graph):
            if not isinstance(text, str):  # protobuf gives the bytes as they are
                raise OnnxFileError(f"{path} holds a name that is no UTF-8: {text!r}.", AGAIN)


def _texts(graph: onnx.GraphProto) -> Iterator[str]:
    """What a graph's parts are called."""
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    for named in (graph.input, graph.output, graph.value_info, graph.initializer):
        yield from (part.name for part in named)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the bodies in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in ([attribute.g] if attribute.HasField("g") else [], attribute.graphs):
                for inner in body:
                    yield from _graphs(inner)


def check_external(path: Path, tensors: Iterable[ir.ExternalTensor]) -> None:
    """Makes sure that weights in data files are there, whole, and where they may be."""
    sizes: dict[str, int] = {}  # so that each file is looked at once
    ends: dict[str, int] = {}
    for tensor in tensors:
        if tensor.path not in sizes:
            sizes[tensor.path] = _data_size(path, tensor)
        _check_extent(path, tensor, sizes[tensor.path])
        end = (tensor.offset or 0) + tensor.nbytes
        ends[tensor.path] = max(end, ends.get(tensor.path, 0))
    for data, end in ends.items():
        _refuse_holes(path, Path(data), end)


def _refuse_holes(path: Path, data: Path, end: int) -> None:
    """Refuses a file of nothing behind the last weight: hashing it would take for ever."""
    status = data.stat()
    empty = status.st_blocks * _BLOCK_BYTES < status.st_size // 2
    if empty and status.st_size > max(2 * end, end + _MOST_BEHIND_BYTES):
        raise UnsafeOnnxFileError(
            f"{path}: its external data {data.name!r} has {status.st_size} bytes, most of them "
            f"holes, and the weights end at byte {end}.",
            AGAIN,
        )


def _data_size(path: Path, tensor: ir.ExternalTensor) -> int:
    """The size of a data file, once it is known to lie where one may."""
    location = os.fspath(tensor.location)
    data = Path(tensor.path)
    inside = not Path(location).is_absolute() and not {"..", "\0"} & {
        *Path(location).parts,
        *location,
    }
    if not inside or not may_lie_at(path, data):
        raise UnsafeOnnxFileError(
            f"{path}: its external data {location!r} lies outside the model's folder.",
            "Copy the data file beside the ONNX file, and name it there.",
            code="outside-folder",
        )
    if not data.is_file():
        raise OnnxFileError(
            f"{path}: its external data {location!r} is missing.",
            "Copy the data file beside the ONNX file.",
            code="data-missing",
        )
    return data.stat().st_size


def _check_extent(path: Path, tensor: ir.ExternalTensor, size: int) -> None:
    try:
        offset, length = tensor.offset or 0, tensor.nbytes
    except TypeError:
        raise OnnxFileError(
            f"{path}: the weight {tensor.name!r} is of the type {tensor.dtype.name}, which can't "
            "lie in a data file.",
            "Export it again.",
        ) from None
    if tensor.length is not None and tensor.length != length:
        raise OnnxFileError(
            f"{path}: the weight {tensor.name!r} needs {length} bytes, "
            f"but the file declares {tensor.length} for it.",
            AGAIN,
            code="incomplete-onnx",
        )
    if offset < 0 or offset + length > size:
        raise OnnxFileError(
            f"{path}: its external data {tensor.location!r} has {size} bytes, "
            f"but the weight {tensor.name!r} ends at byte {offset + length}.",
            AGAIN,
            code="incomplete-onnx",
        )


_MOST_BYTES = 2 << 30  # protobuf's own limit


def other_reader(data: Path, apart_from: Path) -> Path | None:
    """Another ONNX file of the same folder whose weights lie in ``data``, if there is one.

    Only files that hold the data file's name are parsed; one that can't be is no model.
    """
    for model in sorted(data.parent.glob("*.onnx")):
        same = model.name in (apart_from.name, data.name) and apart_from.parent == data.parent
        if not same and reads(model, data):
            return model
    return None


def reads(model: Path, data: Path) -> bool:
    """Whether an ONNX file has weights in ``data``, which lies in its folder; links count."""
    names = _names(data)
    if not _mentions(model, names):
        return False
    try:
        proto = read_graph(model)
    except MemoryError:
        raise
    except Exception:  # protobuf's own classes
        return False
    return any(os.path.normpath(location) in names for location in _locations(proto.graph))


def read_graph(path: Path) -> onnx.ModelProto:
    """An ONNX file without the weights in its data files."""
    return onnx.load_model_from_string(read_bytes(path, limit=_MOST_BYTES, named=True))


def _names(data: Path) -> set[str]:
    """The file's name, and those of the links to it beside it."""
    links = (entry for entry in data.parent.iterdir() if entry.is_symlink() and entry != data)
    target = real(data)
    return {data.name, *(link.name for link in links if real(link) == target)}


def _mentions(file: Path, names: set[str]) -> bool:
    try:
        with (
            opened(file, named=True) as handle,
            mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return any(content.find(name.encode()) >= 0 for name in names)
    except (OSError, ValueError, UnsafeInputError):  # unreadable, or empty
        return False


def _locations(graph: onnx.GraphProto) -> Iterator[str]:
    tensors = [*graph.initializer]
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors]
            for body in (attribute.g, *attribute.graphs):
                yield from _locations(body)
    for tensor in tensors:
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")
