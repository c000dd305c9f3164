"""A decoder from PyTorch's export into fused operators: whole and cut, held against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.engines.runners.cache_form import read_cache_form
from exporter.export.forms.onnxruntime import write_fused_export
from exporter.export.forms.portable import fused_operators
from graph_passes import Deletion, prune_graph, save_model
from tests.tiny_models import family_loaded

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]

# Bounded scores, a window in every other layer, norms on both sides of each branch.
SETTINGS = {"head_dim": 32, "sliding_window": 6, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def gemma() -> Any:
    return family_loaded("gemma2", **SETTINGS)


@pytest.fixture(scope="module")
def form(gemma: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("form")
    written = write_fused_export(gemma, folder)
    assert written.remark is None
    return folder / "model.onnx"


def test_it_says_what_pytorch_says(gemma: Any, form: Path) -> None:
    from exporter.export.parity import check_export

    model = ir.load(form)
    counts = fused_operators(model)
    assert counts["GroupQueryAttention"] == 2
    assert counts["SkipSimplifiedLayerNormalization"] == 4
    windows = [
        node.attributes.get_int("local_window_size")
        for node in model.graph
        if node.op_type == "GroupQueryAttention"
    ]
    assert windows == [6, -1]
    assert len(read_cache_form(form).shared) == 4
    assert all(check.passed for check in check_export(gemma, form))


def test_a_cut_says_what_pytorch_says_without_it(gemma: Any, form: Path, tmp_path: Path) -> None:
    from exporter.export.parity import check_export

    cut, _ = prune_graph(ir.load(form), [Deletion(0, "attention"), Deletion(1, "mlp")])
    save_model(cut, tmp_path / "model.onnx")
    assert fused_operators(cut)["SkipSimplifiedLayerNormalization"] == 2
    planned = [
        PlannedDeletion(layer=0, kind="attention"),
        PlannedDeletion(layer=1, kind="mlp"),
    ]
    checks = check_export(gemma, tmp_path / "model.onnx", deletions=planned)
    assert all(check.passed for check in checks)
