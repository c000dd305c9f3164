"""What goes with a cut, such as the exporter's notes, and what stays: all that is the caller's."""

from __future__ import annotations

import json
from collections.abc import Iterator

import onnx_ir as ir
import pytest
from fused_graphs import FUSED, fused_model
from graph_support import tiny

from graph_passes import Deletion, prune_graph
from graph_passes.cleanup import Swept, sweep
from graph_passes.delete_sublayers import DeleteSublayersPass
from graph_passes.pipeline import graph_size
from graph_passes.plan_record import RENUMBERING_KEY

PLAN = [Deletion(1, "attention"), Deletion(2, "mlp")]
SECRET = "/home/someone/secret.py"


def _messages(proto: object) -> Iterator[str]:
    yield from (part for part in str(proto).splitlines() if SECRET in part)


def test_the_callers_tensors_keep_their_notes() -> None:
    model = tiny("pre_norm")
    tensors = [value.const_value for value in model.graph.initializers.values()]
    for tensor in tensors:
        assert tensor is not None
        tensor.metadata_props["from"] = SECRET
        tensor.doc_string = SECRET
    pruned, _ = prune_graph(model, PLAN)
    assert all(t is not None and t.metadata_props and t.doc_string == SECRET for t in tensors)
    assert [v.const_value for v in model.graph.initializers.values()] == tensors
    assert list(_messages(ir.to_proto(pruned))) == []


def test_weights_in_constant_nodes_are_counted() -> None:
    model = tiny("pre_norm")
    before = graph_size(model)
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and len(tensor.shape) > 1:
            constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)])
            model.graph.insert_before(model.graph[0], constant)
            value.replace_all_uses_with(constant.outputs[0])
            del model.graph.initializers[value.name or ""]
    as_constants = graph_size(model)
    assert (as_constants.parameters, as_constants.bytes) == (before.parameters, before.bytes)
    _, report = prune_graph(model, PLAN)
    _, expected = prune_graph(tiny("pre_norm"), PLAN)
    assert report.after.parameters == expected.after.parameters
    removed = [entry.parameters_removed for entry in report.deleted]
    assert removed == [entry.parameters_removed for entry in expected.deleted]


def test_a_second_renumbering_keeps_the_way_to_the_original() -> None:
    first, _ = prune_graph(tiny("pre_norm"), [Deletion(0, "attention")], renumber_kv=True)
    second, report = prune_graph(first, [Deletion(1, "attention")], renumber_kv=True)
    assert report.kv_renumbering["present.1.key"] == "present.0.key"
    assert json.loads(second.metadata_props[RENUMBERING_KEY]) == {
        "past_key_values.2.key": "past_key_values.0.key",
        "past_key_values.2.value": "past_key_values.0.value",
        "present.2.key": "present.0.key",
        "present.2.value": "present.0.value",
    }


@pytest.mark.parametrize("model", [tiny("pre_norm"), fused_model(FUSED["genai"])])
def test_caches_can_be_renumbered_when_nothing_is_left_to_cut(model: ir.Model) -> None:
    plan = [Deletion(0, "attention")]
    first, _ = prune_graph(model, plan)
    second, report = prune_graph(first, plan, renumber_kv=True)
    at_once, expected = prune_graph(model, plan, renumber_kv=True)
    assert report.deleted == ()
    assert report.kv_renumbering == expected.kv_renumbering != {}
    assert second.metadata_props == at_once.metadata_props
    assert [v.name for v in second.graph.inputs] == [v.name for v in at_once.graph.inputs]
    assert not DeleteSublayersPass(plan, renumber_kv=True)(second).modified


def packed(name: str, rows: int, blocks: int) -> str:
    """Initializers of a packed matrix of 4 bits, in blocks of 32."""
    blanks = ", ".join(["0"] * (rows * blocks * 16))
    ones = ", ".join(["1"] * (rows * blocks))
    return (
        f"uint8[{rows}, {blocks}, 16] {name} = {{{blanks}}}, "
        f"float[{rows}, {blocks}] {name}_scales = {{{ones}}}"
    )


@pytest.mark.parametrize(
    ("name", "counted"), [("p/block_sums", 32 * 3), ("p/other", 32 * (32 + 6))]
)
def test_rows_for_the_sums_of_blocks_are_no_parameters(name: str, counted: int) -> None:
    """A product of 32 weights a row, which has further rows for the blocks' sums."""
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
        small (float[1, 32] x) => (float[1, 3] y)
        <{packed("ones", 32, 1)}, {packed("weight", 3, 2)}> {{
          [sums] sums = com.microsoft.MatMulNBits<K = 32, N = 32, bits = 4, block_size = 32>(
            x, ones, ones_scales)
          [joined] both = Concat<axis = -1>(x, sums)
          [p] y = com.microsoft.MatMulNBits<K = 64, N = 3, bits = 4, block_size = 32>(
            both, weight, weight_scales)
        }}""")
    model.graph.node("sums").name = name
    assert graph_size(model).parameters == counted
    model.graph.outputs.clear()
    assert sweep(model.graph, list(model.graph)) == Swept(nodes=3, parameters=counted)
