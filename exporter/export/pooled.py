"""Puts a sentence encoder's pooling into its graph, as its folder says it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from exporter.errors import ExportError
from exporter.export.onnx_output import MODEL_FILE, save_graph
from exporter.models.sentence_folder import Pooling, read_pooling
from graph_passes.fusing.pooling import SentencePoolingPass

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel


def pooling_for(loaded: LoadedModel) -> Pooling:
    """How a model's graph is to pool."""
    if loaded.model.can_generate() or loaded.model.base_model is not loaded.model:
        raise ExportError(
            f"{loaded.ref.architecture} doesn't answer with token states that could be pooled.",
            "Leave --pooling out, or name the class without a head in config.json, under "
            "architectures.",
            code="no-token-states",
        )
    return read_pooling(loaded.path)


def add_pooling(folder: Path, pooling: Pooling) -> None:
    """Gives the graph in a folder one more output, the texts' vectors."""
    model = ir.load(folder / MODEL_FILE)
    layers = [dense.layer for dense in pooling.dense]
    SentencePoolingPass(pooling.modes, normalised=pooling.normalised, dense=layers)(model)
    save_graph(model, folder)
