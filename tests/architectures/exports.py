"""Writes a subject's parts as ONNX files and opens them again as the surgery reads them."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graph_passes.files.storage import load_model
from tests.architectures.catalogue import Architecture
from tests.architectures.subjects import Part, Subject

OPSET = 20


@dataclass
class Exported:
    """A graph with the folder of its weights."""

    model: ir.Model
    folder: Path
    exporter: str


def export(
    architecture: Architecture, model: Any, subject: Subject, folder: Path
) -> list[Exported]:
    """Exports every part."""
    with quiet():
        if architecture.graph in ("decoder", "encoder"):
            path = _by_depthcut(model, folder / "model")
            return [Exported(load_model(path), path.parent, "depthcut export")]
        return [_by_pytorch(model, part, folder / part.name) for part in subject.parts]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' chatter."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _by_depthcut(model: Any, folder: Path) -> Path:
    from exporter.artifacts import ModelRef
    from exporter.export.torch_export import export_onnx
    from exporter.models.loading.model_source import LoadedModel

    name = type(model).__name__
    ref = ModelRef(source=name, architecture=name, num_layers=1, sha256="0" * 64)
    return export_onnx(LoadedModel(model, None, ref, Path(name)), folder, opset=OPSET)


def _by_pytorch(model: Any, part: Part, folder: Path) -> Exported:
    import torch

    from exporter.export.torch_export import exportable_experts

    dims: dict[str, Any] = {}
    for axes in part.dynamic.values():
        dims |= {name: torch.export.Dim(name) for name in axes.values() if name not in dims}
    shapes = {
        name: {axis: dims[dim] for axis, dim in part.dynamic.get(name, {}).items()}
        for name in part.example
    }
    folder.mkdir(parents=True)
    with exportable_experts(model), torch.no_grad():
        program = torch.onnx.export(
            part.module,
            kwargs={"inputs": part.example},
            input_names=list(part.example),
            output_names=part.outputs,
            dynamic_shapes={"inputs": shapes},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(folder / "model.onnx", external_data=True)
    return Exported(load_model(folder / "model.onnx"), folder, "torch.onnx.export")
