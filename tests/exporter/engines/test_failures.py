"""Builds that give no engine are told in words."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from exporter.engines.build.build import build_engines, let_decompose
from exporter.engines.build.check import check_engine
from exporter.engines.build.logs import no_engine
from exporter.engines.build.network import Builder
from exporter.engines.build.profiles import Ranges, Span
from exporter.engines.build.settings import BuildSettings
from exporter.errors import EngineError
from graph_passes import save_model
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_model

SMALL = Ranges(prompt=Span(1, 4, 8), context=Span(1, 4, 8))
ATTENTION = """
<ir_version: 10, opset_import: ["": 23]>
m (float[1, 2, s, 32] q, float[1, 2, s, 32] k, float[1, 2, s, 32] v) => (float[1, 2, s, 32] y) {
    y = Attention(q, k, v)
}
"""

FILLED = """
<ir_version: 10, opset_import: ["": 24]>
m (float[1, 2, 1, 32] q, float[1, 2, 8, 32] k, float[1, 2, 8, 32] v, int64[1] n)
    => (float[1, 2, 1, 32] y, int64[1] m) {
    y = Attention(q, k, v, , , , n)
    m = Identity(n)
}
"""


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (["something new", "second"], "no-engine-made"),
        (["first", "Requested amount could not be allocated: Out of memory"], "out-of-memory"),
        ([], "no-engine-made"),
    ],
)
def test_what_the_builder_says_is_passed_on(said: list[str], code: str) -> None:
    error = no_engine(said)
    assert error.code == code
    assert all(text in error.message for text in said[:1])


@pytest.mark.rtx
def test_too_small_a_workspace(tmp_path: Path) -> None:
    save_model(tiny_model(TinySpec()), tmp_path / "m.onnx")
    with raises(EngineError, "no-engine-made") as caught:
        build_engines(
            tmp_path / "m.onnx", tmp_path / "out", ranges=SMALL,
            settings=BuildSettings(workspace_bytes=1),
        )  # fmt: skip
    assert "workspace" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.rtx
def test_attention_in_fp32_is_written_out(tmp_path: Path) -> None:
    ir.save(ir.from_onnx_text(ATTENTION), tmp_path / "m.onnx")
    before = (tmp_path / "m.onnx").read_bytes()
    ranges = Ranges(dims=("s=1:4:8",))
    ((engine, record),) = build_engines(tmp_path / "m.onnx", tmp_path / "out", ranges=ranges)
    assert engine.is_file()
    assert sum(record.layers.values()) >= 1
    assert (tmp_path / "m.onnx").read_bytes() == before


@pytest.mark.rtx
def test_without_leave_the_builder_refuses_it(tmp_path: Path) -> None:
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
    ir.save(ir.from_onnx_text(ATTENTION), tmp_path / "m.onnx")
    builder = Builder(tensorrt_rtx)
    parsed = builder.parse(tmp_path / "m.onnx")
    assert not parsed.obstacles
    config = builder.builder.create_builder_config()
    profile = builder.builder.create_optimization_profile()
    for name in "qkv":
        profile.set_shape(name, (1, 2, 1, 32), (1, 2, 4, 32), (1, 2, 8, 32))
    config.add_optimization_profile(profile)
    assert builder.builder.build_serialized_network(parsed.network, config) is None
    assert "Attention" in no_engine(builder.listener.errors()).message


@pytest.mark.rtx
def test_what_the_parser_would_pass_over_is_refused(tmp_path: Path) -> None:
    ir.save(ir.from_onnx_text(FILLED), tmp_path / "m.onnx")
    (finding,) = check_engine(tmp_path / "m.onnx").findings
    assert "nonpad_kv_seqlen" in finding.reason
    assert "mask" in finding.way_out
    with raises(EngineError, "not-parsed", "nonpad_kv_seqlen"):
        build_engines(tmp_path / "m.onnx", tmp_path / "out")
    ir.save(ir.from_onnx_text(FILLED.replace(", , , , n)", ")")), tmp_path / "whole.onnx")
    assert not check_engine(tmp_path / "whole.onnx").findings


def test_the_attribute_is_added_once_and_everywhere() -> None:
    inner = ir.to_proto(ir.from_onnx_text(ATTENTION)).graph
    model = ir.to_proto(ir.from_onnx_text(ATTENTION))
    model.graph.node.append(onnx.NodeProto(op_type="If"))
    body = onnx.AttributeProto(name="then_branch", type=onnx.AttributeProto.GRAPH, g=inner)
    model.graph.node[-1].attribute.append(body)
    assert let_decompose(model)
    assert let_decompose(model)
    assert str(model).count("TRT_decomposable") == 2
    model.graph.node[0].op_type = model.graph.node[-1].attribute[0].g.node[0].op_type = "Add"
    assert not let_decompose(model)
