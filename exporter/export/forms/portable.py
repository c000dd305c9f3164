"""The plain form: ONNX's own operators, for any runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from exporter.export.forms.noting import WrittenForm, version_of
from exporter.export.optimum_export import export_with_optimum
from exporter.export.options import ExporterName
from exporter.progress import QUIET, Progress
from graph_passes.files.unfinished import Unfinished

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

PORTABLE_OPSET = 20
"""The widest reach; 18 gives the same graph."""
FUSED_OPSET = 23
"""Has Attention, RMSNormalization and RotaryEmbedding."""


def write_portable(
    loaded: LoadedModel,
    folder: Path,
    *,
    exporter: ExporterName | None = None,
    opset: int | None = None,
    unfinished: Unfinished | None = None,
    progress: Progress = QUIET,
) -> WrittenForm:
    """Exports a model with PyTorch's exporter, or optimum's.

    Args:
        loaded: The model.
        folder: Takes ``model.onnx`` and its weights.
        exporter: None: PyTorch's.
        opset: None: :data:`PORTABLE_OPSET` for PyTorch's, its own choice for optimum's.
        unfinished: Where the weights grow; for PyTorch's alone.
        progress: Hears what the exporter says.

    Raises:
        ExportError: The exporter can't export the model.
        MissingDependencyError: It is not installed.
    """
    if exporter == "optimum":
        export_with_optimum(loaded, folder, opset=opset, progress=progress)
        return WrittenForm(version_of("optimum-onnx"))
    from exporter.export.torch_export import export_onnx

    chosen = opset or PORTABLE_OPSET
    export_onnx(loaded, folder, opset=chosen, unfinished=unfinished, progress=progress)
    return WrittenForm(f"{version_of('torch')}, opset {chosen}")
