"""Writes an exported graph and its weights as two files that appear together."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import onnx_ir as ir

from exporter.disk import telling_full_disk
from exporter.progress import QUIET, ByteCount, Progress
from graph_passes.files.storage import weight_bytes, write_files
from graph_passes.files.unfinished import Unfinished

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
_INLINE_BYTES = 1024  # what a graph may hold itself
_LEFT_BYTES = 256  # what stays in it here


def save_onnx(
    model: ir.Model,
    folder: Path,
    *,
    unfinished: Unfinished | None = None,
    progress: Progress = QUIET,
) -> Path:
    """Writes graph and weights; ``folder`` gets both files, or neither.

    Weights are asked for one after the other and written in pieces, so that lazy ones
    (``onnx_ir.LazyTensor``) are never in memory together.

    Args:
        model: It is unchanged.
        folder: Made when missing.
        unfinished: Where the weights grow, for a run that goes on with what an interrupted one has
            left; None: nothing is left.
        progress: Hears how many bytes of large weights are written.

    Raises:
        OSError: When they can't be written; a full disk by its number, before anything is written
            where it can be told.
        OnnxFileError: The graph can't be serialised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = weight_bytes(model)
    with (
        telling_full_disk(folder),
        tempfile.TemporaryDirectory(prefix=".export.", suffix=".part", dir=folder) as name,
    ):
        if any(map(_is_lazy, model.graph.initializers.values())):
            _require_room(folder, size, unfinished)
        part = Path(name)
        with ByteCount.large(progress, f"write {DATA_FILE}", size) as count:
            write_files(
                *(model, part, MODEL_FILE, "compact"),
                inline_bytes=_LEFT_BYTES,
                told=count.add,
                unfinished=unfinished,
            )
        # Nothing reads the data without the graph that names it, so the graph comes last.
        if not (part / DATA_FILE).exists():
            (part / DATA_FILE).touch()
        for file in (DATA_FILE, MODEL_FILE):
            (part / file).replace(folder / file)
    return folder / MODEL_FILE


def save_graph(model: ir.Model, folder: Path) -> Path:
    """Writes a graph that was loaded from ``folder`` back; its weights' file stays where it can.

    Where a pass has made weights of its own, graph and weights are both written anew.

    Raises:
        OSError: When it can't be written; a full disk by its number.
    """
    if any(map(_is_new, model.graph.initializers.values())):
        return save_onnx(model, folder)
    part = folder / f".{MODEL_FILE}.part"
    with telling_full_disk(folder):
        ir.save(model, part)
        part.replace(folder / MODEL_FILE)
    return folder / MODEL_FILE


def _require_room(folder: Path, size: int, unfinished: Unfinished | None) -> None:
    """Tells a full disk before an hour of writing, not after."""
    written = 0 if unfinished is None else unfinished.bytes_on_disk
    if size - written > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _is_lazy(value: ir.Value) -> bool:
    return isinstance(value.const_value, ir.LazyTensor)


def _is_new(value: ir.Value) -> bool:
    tensor = value.const_value
    outside = isinstance(tensor, ir.ExternalTensor)
    return tensor is not None and not outside and tensor.nbytes > _INLINE_BYTES
