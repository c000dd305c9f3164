"""Sizes of sublayers, held against what the surgery removes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter.choose.costs.graph_sizes import GraphSizes, SublayerSize
from exporter.choose.costs.weighing import sizes, weigh
from exporter.errors import CostError
from graph_passes.finding.weights import is_weight
from graph_passes.pipeline import graph_size, prune_graph
from graph_passes.replacements import ReplacementTensors
from graph_passes.types import Deletion, SublayerRef
from tests.raising import raises
from tests.tiny_graphs import HEAD_DIM, HEADS, HIDDEN, TinySpec, tiny_model

SPECS = [
    TinySpec(),
    TinySpec("post_norm", cache=False),
    TinySpec("sandwich"),
    TinySpec("norm_after"),
    TinySpec("multiplier"),
    TinySpec("parallel_in_turn"),
    TinySpec("split_mlp"),
    TinySpec(fused=True),
    TinySpec(tied=True),
    TinySpec(router=True),
    TinySpec(mask_in_branch=True),
]


def random_numbers(ref: SublayerRef, kind: str) -> dict[SublayerRef, ReplacementTensors]:
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(HIDDEN).astype(np.float32)
    weight = rng.standard_normal((HIDDEN, HIDDEN)).astype(np.float32)
    return {ref: ReplacementTensors(bias, weight if kind == "linear" else None)}


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_sublayer_is_what_the_surgery_removes(spec: TinySpec) -> None:
    model = tiny_model(spec)
    result = weigh(model, {})
    assert len(result.sublayers) == 2 * spec.layers
    for (layer, kind), size in result.sublayers.items():
        pruned, report = prune_graph(model, [Deletion(layer, kind)])
        (entry,) = report.deleted
        assert size.parameters == entry.parameters_removed
        assert size.weight_bytes == report.before.bytes - report.after.bytes
        assert result.total_parameters({(layer, kind): "none"}) == graph_size(pruned).parameters
        assert result.total_bytes({(layer, kind): "none"}) == graph_size(pruned).bytes


@pytest.mark.parametrize("kind", ["bias", "linear"])
def test_a_replacement_takes_as_much_as_the_surgery_puts_in(kind: str) -> None:
    model = tiny_model()
    result = weigh(model, {})
    for name in result.sublayers:
        ref = SublayerRef(*name)
        deletion = Deletion(*name, kind)
        pruned, report = prune_graph(model, [deletion], replacements=random_numbers(ref, kind))
        (entry,) = report.deleted
        own = result[name]
        removed = own.linear_parameters if kind == "linear" else own.parameters
        assert entry.parameters_removed == removed
        assert result.replacement_parameters(kind) == entry.parameters_added
        assert result.total_parameters({name: kind}) == graph_size(pruned).parameters
        assert result.total_bytes({name: kind}) == graph_size(pruned).bytes


OWN_NORMS = [spec for spec in SPECS if not spec.form.startswith("parallel")]


@pytest.mark.parametrize("spec", OWN_NORMS, ids=str)
def test_sublayers_and_the_rest_are_the_whole_graph(spec: TinySpec) -> None:
    model = tiny_model(spec)
    result = weigh(model, {})
    names = [Deletion(*name) for name in result.sublayers][1:]
    pruned, _ = prune_graph(model, names)  # not all: one must stay
    first = next(iter(result.sublayers.values()))
    left = graph_size(pruned)
    gone = [size for size in result.sublayers.values() if size is not first]
    assert result.parameters - sum(size.parameters for size in gone) == left.parameters
    assert result.weight_bytes - sum(size.weight_bytes for size in gone) == left.bytes
    weights = [v.const_value for v in model.graph.initializers.values() if is_weight(v)]
    assert result.weight_bytes == sum(tensor.nbytes for tensor in weights if tensor is not None)


def test_a_norm_that_two_branches_share_goes_with_neither() -> None:
    model = tiny_model(TinySpec("parallel"))
    result = weigh(model, {})
    for name, size in result.sublayers.items():
        _, report = prune_graph(model, [Deletion(*name)])
        assert size.parameters == report.deleted[0].parameters_removed
    pruned, _ = prune_graph(model, [Deletion(0, "block")])
    alone = result.total_parameters({(0, "attention"): "none", (0, "mlp"): "none"})
    assert graph_size(pruned).parameters == alone - 2 * HIDDEN  # never more than was foretold


def test_a_cache_grows_by_the_token_and_by_the_sequence() -> None:
    result = weigh(tiny_model(), {})
    attention, mlp = result[0, "attention"], result[0, "mlp"]
    per_token = 2 * HEADS * HEAD_DIM * 4
    assert attention.kv_bytes(100, batch=3) == 300 * per_token
    assert mlp.kv_bytes(100, batch=3) == 0
    whole = result.total_bytes(context=100, batch=3)
    assert whole == result.weight_bytes + 3 * 300 * per_token  # three layers
    without = result.total_bytes({(0, "attention"): "none"}, context=100, batch=3)
    assert whole - without == attention.weight_bytes + 300 * per_token


def test_a_window_bounds_what_is_kept_and_a_buffer_fixes_it() -> None:
    model = tiny_model()
    names = [f"past_key_values.1.{part}" for part in ("key", "value")]
    result = weigh(model, dict.fromkeys(names, 16))
    per_token = 2 * HEADS * HEAD_DIM * 4
    assert result[1, "attention"].kv_bytes(10) == 10 * per_token
    assert result[1, "attention"].kv_bytes(100) == 16 * per_token
    assert result[0, "attention"].kv_bytes(100) == 100 * per_token
    for value in model.graph.inputs:
        if value.name in names:
            value.shape = ir.Shape(["batch", HEADS, 64, HEAD_DIM])
    fixed = weigh(model, {})[1, "attention"]
    assert fixed.kv_bytes(1) == fixed.kv_bytes(64) == 64 * per_token


def test_other_shapes_have_another_signature() -> None:
    result = weigh(tiny_model(TinySpec(router=True)), {})  # layer 0's MLP has a gate
    assert result[0, "mlp"].signature != result[1, "mlp"].signature
    assert result[1, "mlp"].signature == result[2, "mlp"].signature
    fused = tiny_model(TinySpec(fused=True))
    node = [n for n in fused.graph if n.op_type == "Attention"][1]
    node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 4)
    windowed = weigh(fused, {})
    assert windowed[1, "attention"].signature != windowed[0, "attention"].signature
    assert windowed[2, "attention"].signature == windowed[0, "attention"].signature


def test_a_file_is_read_with_the_longest_text_of_its_config(tmp_path: Path) -> None:
    ir.save(tiny_model(), tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    result = sizes(tmp_path / "model.onnx")
    assert result.total_bytes(context=64) > result.total_bytes(context=63)
    with raises(CostError, "context-too-long", 64, 65):
        result.total_bytes(context=65)


def test_what_is_not_there_has_no_size() -> None:
    result = weigh(tiny_model(), {})
    with raises(CostError, "sublayer-missing", "attention 7"):
        result.saved_parameters((7, "attention"))
    nameless = GraphSizes({(0, "mlp"): SublayerSize(10, 9, 40, 36)}, 100, 400)
    assert nameless.saved_parameters((0, "mlp")) == 10
    with raises(CostError, "width-unknown", "bias"):
        nameless.saved_parameters((0, "mlp"), "bias")


def test_a_graph_without_sublayers_says_why() -> None:
    text = """<ir_version: 10, opset_import: ["": 20]>
    g (float[b, 4] x) => (float[b, 4] y) { y = Relu(x) }"""
    with raises(CostError, "no-sublayers"):
        weigh(ir.from_onnx_text(text), {})
