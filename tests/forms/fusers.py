"""What can write a model in fused operators, each as one function of a model and a folder."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tests.forms.subjects import HEADS, POSITIONS, SIZE, Subject

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

Fuser = Callable[[Subject, "LoadedModel", Path], Path]
"""Writes into an empty folder, and gives the graph's path."""


def builder(subject: Subject, loaded: LoadedModel, folder: Path) -> Path:
    """onnxruntime-genai's model builder."""
    from exporter.export.forms.genai_builder import build_decoder

    build_decoder(loaded, folder, "cpu")
    return folder / "model.onnx"


def transformers_optimizer(subject: Subject, loaded: LoadedModel, folder: Path) -> Path:
    """onnxruntime.transformers.optimizer on our export; GPT-2's rules for all decoders."""
    from onnxruntime.transformers.optimizer import optimize_model

    source = _exported(loaded, folder, 20)
    name = "gpt2" if subject.kind == "decoder" else "bert"
    with contextlib.redirect_stdout(io.StringIO()):
        fused = optimize_model(
            str(source), model_type=name, num_heads=HEADS, hidden_size=HEADS * SIZE, opt_level=0
        )
        fused.save_model_to_file(str(folder / "fused.onnx"))
    return folder / "fused.onnx"


def rewrite_rules(opset: int) -> Fuser:
    """onnxscript's rules for ONNX Runtime, on our export."""

    def write(subject: Subject, loaded: LoadedModel, folder: Path) -> Path:
        import onnx_ir as ir
        from onnxscript.rewriter.ort_fusions import optimize_for_ort

        from graph_passes import save_model

        fused, _ = optimize_for_ort(ir.load(_exported(loaded, folder, opset)))
        save_model(fused, folder / "fused.onnx")
        return folder / "fused.onnx"

    return write


def own(subject: Subject, loaded: LoadedModel, folder: Path) -> Path:
    """What depthcut does: its own passes for decoders, onnxscript's rules and more for encoders."""
    import onnx_ir as ir

    from exporter.errors import ExportError
    from exporter.export.forms.encoder import fuse_encoder
    from graph_passes import save_model
    from graph_passes.fusing import fuse_decoder

    if subject.kind == "encoder":
        fused = fuse_encoder(ir.load(_exported(loaded, folder, 20)))
    else:
        try:
            source = _exported(loaded, folder, 23)
        except ExportError:
            source = _exported(loaded, folder, 20)
        fused, _ = fuse_decoder(ir.load(source), positions=POSITIONS)
    save_model(fused, folder / "fused.onnx")
    return folder / "fused.onnx"


def _exported(loaded: LoadedModel, folder: Path, opset: int) -> Path:
    """Our export of a model, made once for all fusers."""
    from exporter.export.torch_export import export_onnx

    place = folder.parent / f"plain {loaded.ref.source} {opset}"
    made = place / "model.onnx"
    return made if made.exists() else export_onnx(loaded, place, opset=opset)


FUSERS: dict[str, Fuser] = {
    "genai builder": builder,
    "ORT optimizer": transformers_optimizer,
    "onnxscript, opset 20": rewrite_rules(20),
    "onnxscript, opset 23": rewrite_rules(23),
    "depthcut": own,
}
