"""A decoder for ONNX Runtime out of PyTorch's export: our own passes fuse what that writes.

For the architectures that onnxruntime-genai's builder doesn't know, and where it isn't installed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from exporter.export.forms.noting import WrittenForm
from exporter.export.forms.portable import FUSED_OPSET, write_portable
from exporter.export.onnx_output import MODEL_FILE, save_onnx
from exporter.progress import QUIET, Progress
from graph_passes.errors import FusionError
from graph_passes.files.unfinished import Unfinished
from graph_passes.fusing import fuse_decoder

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

PLAIN = "so this is the plain export, whose cache grows"


def write_fused_export(
    loaded: LoadedModel,
    folder: Path,
    progress: Progress = QUIET,
    *,
    opset: int = FUSED_OPSET,
    unfinished: Unfinished | None = None,
) -> WrittenForm:
    """Exports a decoder and fuses its attentions and norms.

    Args:
        loaded: The model.
        folder: Takes ``model.onnx`` and its weights.
        progress: Hears what the exporter says, and what could not be fused.
        opset: Of the export. Some models can't be exported at 23, whose norms fuse best.
        unfinished: Where the export's weights grow.

    Returns:
        How it was written. Where the attentions can't be fused it is the plain export, and the
        remark says why.

    Raises:
        ExportError: PyTorch's exporter can't export the model at that opset.
    """
    written = write_portable(loaded, folder, opset=opset, unfinished=unfinished, progress=progress)
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return replace(written, remark=f"the config doesn't tell how long a text may be, {PLAIN}")
    try:
        model, report = fuse_decoder(ir.load(folder / MODEL_FILE), positions=positions)
    except FusionError as error:
        progress.say(f"form: {error.message}")
        return replace(written, remark=f"{error.message.rstrip('.')}, {PLAIN}")
    save_onnx(model, folder, progress=progress)
    for remark in report.remarks:
        progress.detail(f"form: {remark}")
    return replace(written, passes=("fuse_decoder",))
