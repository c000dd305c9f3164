"""The form of encoders for ONNX Runtime: attentions, residual sums and embeddings as one node."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from exporter.errors import BackendError, ExportError, first_line, pass_on_memory_error
from exporter.export.forms.noting import WrittenForm, fused_operators, version_of
from exporter.export.forms.portable import write_portable
from exporter.export.onnx_output import MODEL_FILE, save_onnx
from exporter.progress import Progress
from graph_passes import CleanupPass
from graph_passes.files.storage import own_data
from graph_passes.files.unfinished import Unfinished
from graph_passes.fusing.embedding import fuse_embedding
from graph_passes.fusing.skip_norms import fuse_skip_norms

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

SOURCE_OPSET = 20
"""Of the export: onnxscript knows the attention that is written out there, not opset 23's."""

_ATTENTION = frozenset({"Attention", "MultiHeadAttention"})
_PLAIN = "so this is the plain export"


def write_encoder(
    loaded: LoadedModel,
    folder: Path,
    progress: Progress,
    *,
    unfinished: Unfinished | None = None,
) -> WrittenForm:
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
    from exporter.export.parity import check_export

    save_onnx(fuse_encoder(ir.load(source / MODEL_FILE)), folder)
    check_export(loaded, folder / MODEL_FILE)
    return fused_operators(ir.load(folder / MODEL_FILE))


def fuse_encoder(model: ir.Model) -> ir.Model:
    """Writes an encoder in ONNX Runtime's fused operators.

    onnxscript's rewrite rules do most of it. What they leave is done before and after: embeddings,
    and norms without a bias. ONNX Runtime's own optimizer finds no attention in what PyTorch
    exports today: it wants another mask.

    Args:
        model: As PyTorch's exporter writes it at :data:`SOURCE_OPSET`, cut or not; it is changed.

    Returns:
        The same, with fewer and larger operators.

    Raises:
        ExportError: A rule fails on this graph, whose state is then unknown.
    """
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    fuse_embedding(model.graph)
    CleanupPass(keep_debug=True)(model)
    try:
        fused, _ = optimize_for_ort(model)
    # Each of the rules is code of its own, with no error class.
    except Exception as error:
        pass_on_memory_error(error)
        raise ExportError(f"onnxscript can't fuse this graph: {first_line(error)}.") from error
    fuse_skip_norms(fused.graph)
    fused.graph.sort()
    CleanupPass(keep_debug=True)(fused)
    return fused
