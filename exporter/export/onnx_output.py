"""Writes an exported graph and its weights together, and puts a sentence encoder's pooling in."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from exporter.errors import ExportError
from exporter.files import telling_full_disk
from exporter.models.sentence_folder import Pooling, read_pooling
from exporter.progress import QUIET, ByteCount, Progress
from graph_passes.files.placing import staging
from graph_passes.files.storage import stale_data, weight_bytes, write_files
from graph_passes.fusing.pooling import SentencePoolingPass

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel


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


def pooling_for(loaded: LoadedModel) -> Pooling:
    """How a model's graph is to pool."""
    if loaded.model.can_generate() or loaded.model.base_model is not loaded.model:
        raise ExportError(
            f"{loaded.ref.architecture} doesn't answer with token states that could be pooled.",
            "Leave --pooling out, or name the class without a head in config.json, under "
            "architectures.",
            code="takes-no-tokens",
        )
    return read_pooling(loaded.path)


def add_pooling(folder: Path, pooling: Pooling) -> None:
    """Gives the graph in a folder one more output, the texts' vectors."""
    model = ir.load(folder / MODEL_FILE)
    layers = [dense.layer for dense in pooling.dense]
    SentencePoolingPass(pooling.modes, normalised=pooling.normalised, dense=layers)(model)
    save_graph(model, folder)
