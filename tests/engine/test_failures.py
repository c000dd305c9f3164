"""Builds that give no engine are told in words."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from exporter.engine.build import build_engines
from exporter.engine.failures import no_engine
from exporter.engine.profiles import Ranges, Span
from exporter.engine.settings import BuildSettings
from exporter.errors import EngineError
from graph_passes import save_model
from graph_passes.tiny_graphs import TinySpec, tiny_model

SMALL = Ranges(prompt=Span(1, 4, 8), context=Span(1, 4, 8))
ATTENTION = """
<ir_version: 10, opset_import: ["": 23]>
m (float[1, 2, s, 32] q, float[1, 2, s, 32] k, float[1, 2, s, 32] v) => (float[1, 2, s, 32] y) {
    y = Attention(q, k, v)
}
"""


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("no tactics to implement the operation within workspace limit.", "scratch memory"),
        ("Requested amount of GPU memory could not be allocated: Out of memory", "memory ran out"),
        ("something new", "no engine: something new"),
    ],
)
def test_what_the_builder_says_is_told(said: str, told: str) -> None:
    assert told in no_engine(["first", said] if told != f"no engine: {said}" else [said]).message


def test_a_builder_that_says_nothing() -> None:
    assert "it gives no reason" in no_engine([]).message


@pytest.mark.rtx
def test_too_small_a_workspace(tmp_path: Path) -> None:
    save_model(tiny_model(TinySpec()), tmp_path / "m.onnx")
    with pytest.raises(EngineError, match="scratch memory") as caught:
        build_engines(
            tmp_path / "m.onnx", tmp_path / "out", ranges=SMALL,
            settings=BuildSettings(workspace_bytes=1),
        )  # fmt: skip
    assert "--workspace" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.rtx
def test_attention_in_fp32_is_not_built(tmp_path: Path) -> None:
    ir.save(ir.from_onnx_text(ATTENTION), tmp_path / "m.onnx")
    ranges = Ranges(dims={"s": Span(1, 4, 8)})
    with pytest.raises(EngineError, match="no kernel for the graph's Attention") as caught:
        build_engines(tmp_path / "m.onnx", tmp_path / "out", ranges=ranges)
    assert "opset 20" in caught.value.hint
