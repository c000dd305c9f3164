"""A graph that is cut, with its weights in a data file, and what a folder holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.artifacts import PlannedDeletion
from graph_passes.files import storage
from graph_passes.files.storage import save_model
from tests.tiny_graphs import TinySpec, tiny_model

PLAN = [PlannedDeletion(layer=1, kind="attention"), PlannedDeletion(layer=2, kind="block")]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storage, "_INLINE_BYTES", 32)  # tiny weights go to the data file too
    path = tmp_path / "source" / "model.onnx"
    save_model(tiny_model(TinySpec(tied=True)), path)
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
