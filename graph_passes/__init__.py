"""ONNX in, ONNX out: find the sublayers of a Transformer's graph and cut them out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graph_passes.cleanup import CleanupPass
    from graph_passes.delete_sublayers import DeleteSublayersPass
    from graph_passes.errors import DepthcutError, OnnxFileError, SurgeryError
    from graph_passes.files.storage import load_model, save_model
    from graph_passes.locate import find_sites
    from graph_passes.pipeline import prune_graph
    from graph_passes.replacements import ReplacementTensors
    from graph_passes.testing import masked_model
    from graph_passes.types import (
        DeletedSublayer,
        Deletion,
        GraphSize,
        PassReport,
        Refusal,
        ResidualSite,
        SublayerRef,
    )

_HOMES = {
    "CleanupPass": "cleanup",
    "DeleteSublayersPass": "delete_sublayers",
    "DeletedSublayer": "types",
    "Deletion": "types",
    "DepthcutError": "errors",
    "GraphSize": "types",
    "OnnxFileError": "errors",
    "PassReport": "types",
    "Refusal": "types",
    "ReplacementTensors": "replacements",
    "ResidualSite": "types",
    "SublayerRef": "types",
    "SurgeryError": "errors",
    "find_sites": "locate",
    "load_model": "files.storage",
    "masked_model": "testing",
    "prune_graph": "pipeline",
    "save_model": "files.storage",
}

__all__ = [
    "CleanupPass",
    "DeleteSublayersPass",
    "DeletedSublayer",
    "Deletion",
    "DepthcutError",
    "GraphSize",
    "OnnxFileError",
    "PassReport",
    "Refusal",
    "ReplacementTensors",
    "ResidualSite",
    "SublayerRef",
    "SurgeryError",
    "find_sites",
    "load_model",
    "masked_model",
    "prune_graph",
    "save_model",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"graph_passes.{home}"), name)
