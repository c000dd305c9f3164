"""Who else reads a file: the other models in its folder whose weights lie in it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import onnx

from graph_passes.errors import UnsafeInputError
from graph_passes.files.locations import real
from graph_passes.files.reading import opened, read_bytes

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
