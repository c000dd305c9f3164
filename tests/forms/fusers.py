"""What can write a model in fused operators, each as one function of a model and a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tests.forms.subjects import POSITIONS, Subject

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

Fuser = Callable[[Subject, "LoadedModel", Path], Path]
"""Writes into an empty folder, and gives the graph's path."""


def builder(subject: Subject, loaded: LoadedModel, folder: Path) -> Path:
    """onnxruntime-genai's model builder."""
    from exporter.export.forms.genai import build_decoder

    build_decoder(loaded, folder, "cpu")
    return folder / "model.onnx"


def own(subject: Subject, loaded: LoadedModel, folder: Path) -> Path:
    """What depthcut does: its own passes for decoders, onnxscript's rules and more for encoders."""
    import onnx_ir as ir

    from exporter.errors import ExportError
    from exporter.export.forms.onnxruntime import fuse_encoder
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
    "depthcut": own,
}
