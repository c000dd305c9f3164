"""A decoder's windows are counted: a short check can't see one that is missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from exporter.errors import ExportError
from exporter.export.forms.genai import require_windows, windowed_layers
from graph_passes import save_model
from tests.graph_passes.fused_graphs import FusedSpec, fused_model
from tests.raising import raises

FULL, LOCAL = "full_attention", "sliding_attention"


def config(window: int | None, types: list[str] | None = None) -> Any:
    namespace = SimpleNamespace(
        sliding_window=window, max_position_embeddings=64, num_hidden_layers=2
    )
    if types is not None:
        namespace.layer_types = types
    return namespace


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (config(None), 0),
        (config(8), 2),
        (config(64), 0),
        (config(8, [LOCAL, FULL]), 1),
        (config(8, [FULL, FULL]), 0),
        (SimpleNamespace(num_hidden_layers=2), 0),
    ],
)
def test_the_config_tells_which_layers_have_one(config: Any, count: int) -> None:
    assert windowed_layers(config) == count


@pytest.mark.parametrize(("written", "serves"), [(0, False), (1, True), (2, False)])
def test_a_graph_with_more_or_fewer_is_refused(tmp_path: Path, written: int, serves: bool) -> None:
    model = fused_model(FusedSpec(layers=2))
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    for node in nodes[:written]:
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 8)
    save_model(model, tmp_path / "model.onnx")
    if serves:
        require_windows(tmp_path / "model.onnx", config(8, [LOCAL, FULL]))
        return
    with raises(ExportError, "wrong-windows", f"{written} of 2"):
        require_windows(tmp_path / "model.onnx", config(8, [LOCAL, FULL]))
