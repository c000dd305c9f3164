"""Writes an exported graph and its weights as two files that appear together."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import onnx_ir as ir

from exporter.files import telling_full_disk
from exporter.progress import QUIET, ByteCount, Progress
from graph_passes.files.placing import staging
from graph_passes.files.storage import stale_data, weight_bytes, write_files

MODEL_FILE = "model.onnx"
_INLINE_BYTES = 1024  # what a graph may hold itself
_LEFT_BYTES = 256  # what stays in it here


def save_onnx(
    model: ir.Model,
    folder: Path,
    name: str = MODEL_FILE,
    *,
    progress: Progress = QUIET,  # hears how many bytes of large weights are written
) -> Path:
    """Writes graph and weights; ``folder`` gets both files, or neither.

    Weights are asked for one after the other and written in pieces, so that lazy ones
    (``onnx_ir.LazyTensor``) are never in memory together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size, target = weight_bytes(model), folder / name
    with telling_full_disk(folder), staging(target) as staged:
        held = (value.const_value for value in model.graph.initializers.values())
        lazy = any(isinstance(tensor, ir.LazyTensor) for tensor in held)
        if lazy and size > shutil.disk_usage(folder).free:  # told before an hour of writing
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        with ByteCount.large(progress, f"write the weights of {target}", size) as count:
            written = write_files(
                *(model, staged.folder, name, "compact"),
                inline_bytes=_LEFT_BYTES,
                told=count.add,
            )
        moves = [(file, folder / file.name) for file in written]
        staged.place(moves, stale_data(target, written))
    return target


def save_graph(model: ir.Model, folder: Path, name: str = MODEL_FILE) -> Path:
    """Writes a graph that was loaded from ``folder`` back; its weights' file stays where it can.

    Where a pass has made weights of its own, graph and weights are both written anew.
    """
    if any(map(_is_new, model.graph.initializers.values())):
        return save_onnx(model, folder, name)
    target = folder / name
    with telling_full_disk(folder), staging(target) as staged:
        staged.place([(_saved(model, staged.folder / name), target)])
    return target


def _saved(model: ir.Model, path: Path) -> Path:
    ir.save(model, path)
    return path


def _is_new(value: ir.Value) -> bool:
    tensor = value.const_value
    outside = isinstance(tensor, ir.ExternalTensor)
    return tensor is not None and not outside and tensor.nbytes > _INLINE_BYTES
