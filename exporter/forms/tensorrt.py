"""The forms for TensorRT and TensorRT-RTX: ONNX's own fused operators."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from exporter.forms.noting import Written
from exporter.forms.portable import FUSED_OPSET, write_portable
from exporter.progress import Progress

if TYPE_CHECKING:
    from exporter.model_source import LoadedModel


def write_for_tensorrt(loaded: LoadedModel, folder: Path, progress: Progress) -> Written:
    """Exports a model at opset 23, whose Attention, norms and rotary embeddings stay whole.

    Args:
        loaded: The model.
        folder: Takes ``model.onnx`` and its weights.
        progress: Hears what the exporter says.

    Raises:
        ExportError: PyTorch's exporter can't export the model at that opset.
    """
    return write_portable(loaded, folder, opset=FUSED_OPSET, progress=progress)
