"""The form of encoders for ONNX Runtime: attentions, residual sums and embeddings as one node."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.errors import BackendError, ExportError
from exporter.export.forms.encoder_fusion import SOURCE_OPSET, fuse_encoder
from exporter.export.forms.noting import Written, fused_operators, version_of
from exporter.export.forms.portable import write_portable
from exporter.export.onnx_output import MODEL_FILE, save_onnx
from exporter.progress import Progress
from graph_passes.files.storage import own_data
from graph_passes.files.unfinished import Unfinished

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

_ATTENTION = frozenset({"Attention", "MultiHeadAttention"})
_PLAIN = "so this is the plain export"


def write_encoder(
    loaded: LoadedModel,
    folder: Path,
    progress: Progress,
    *,
    unfinished: Unfinished | None = None,
) -> Written:
    """Exports an encoder for ONNX Runtime, and fuses what can be fused.

    The result is run and held against PyTorch before it is taken.

    Args:
        loaded: The model, which doesn't generate.
        folder: Takes ``model.onnx`` and its weights.
        progress: Hears what the exporter says, and what could not be fused.
        unfinished: Where the weights grow.

    Returns:
        How it was written. Where it can't be fused it is the plain export, and the remark says
        why.

    Raises:
        ExportError: PyTorch's exporter can't export the model.
    """
    written = write_portable(
        loaded, folder, opset=SOURCE_OPSET, unfinished=unfinished, progress=progress
    )
    with tempfile.TemporaryDirectory(prefix=".form.", dir=folder) as name:
        try:
            counts = _fused_copy(loaded, folder, Path(name))
        except (ExportError, BackendError) as error:
            reason = error.message.replace(f"{name}/", "").rstrip(".")
            progress.say(f"form: {reason}")
            return replace(written, remark=f"{reason}, {_PLAIN}")
        for weights in own_data(folder / MODEL_FILE):  # of the plain export
            weights.unlink()
        for file in Path(name).iterdir():
            file.replace(folder / file.name)
    told = None if _ATTENTION & counts.keys() else "its attentions are in no form that is fused"
    return replace(written, passes=(version_of("onnxscript"), "fuse_encoder"), remark=told)


def _fused_copy(loaded: LoadedModel, source: Path, folder: Path) -> dict[str, int]:
    """Writes the fused form into another folder, makes sure of it, and counts its operators."""
    import onnx_ir as ir

    from exporter.export.parity import check_export

    save_onnx(fuse_encoder(ir.load(source / MODEL_FILE)), folder)
    check_export(loaded, folder / MODEL_FILE)
    return fused_operators(ir.load(folder / MODEL_FILE))
