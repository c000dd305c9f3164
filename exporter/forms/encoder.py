"""The form of encoders for ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.forms.noting import Written
from exporter.forms.portable import write_portable
from exporter.progress import Progress

if TYPE_CHECKING:
    from exporter.model_source import LoadedModel


def write_encoder(loaded: LoadedModel, folder: Path, progress: Progress) -> Written:
    """Exports an encoder for ONNX Runtime.

    Args:
        loaded: The model, which doesn't generate.
        folder: Takes ``model.onnx`` and its weights.
        progress: Hears what the exporter says.

    Raises:
        ExportError: PyTorch's exporter can't export the model.
    """
    written = write_portable(loaded, folder, progress=progress)
    return replace(written, remark="There is no fused form for encoders yet: this is the plain one")
