"""Writes an exported graph and its weights as two files that appear together."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir

from exporter.disk import telling_full_disk

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
_INLINE_BYTES = 1024  # what a graph may hold itself


def save_onnx(model: ir.Model, folder: Path) -> Path:
    """Writes graph and weights; ``folder`` gets both files, or neither.

    Raises:
        OSError: When they can't be written; a full disk by its number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (
        telling_full_disk(folder),
        tempfile.TemporaryDirectory(prefix=".export.", suffix=".part", dir=folder) as name,
    ):
        part = Path(name)
        ir.save(model, part / MODEL_FILE, external_data=DATA_FILE)
        # Nothing reads the data without the graph that names it, so the graph comes last.
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


def _is_new(value: ir.Value) -> bool:
    tensor = value.const_value
    outside = isinstance(tensor, ir.ExternalTensor)
    return tensor is not None and not outside and tensor.nbytes > _INLINE_BYTES
