"""What fuzzing found, each held by a small case of its own."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from graph_passes import Deletion, Refusal, SurgeryError, find_sites, prune_graph
from graph_passes.finding.weights import parameters
from tests.fuzz.judge import graph

ATTENTION = [Deletion(0, "attention")]


def _model(proto: onnx.ModelProto) -> ir.Model:
    return ir.from_proto(proto)


def _passing_through(name: str) -> ir.Model:
    """A decoder that gives one of its cache inputs out again, as it came."""
    proto = graph("pre_norm")
    proto.graph.output.add().CopyFrom(next(v for v in proto.graph.input if v.name == name))
    return _model(proto)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_cache_that_is_passed_through_stays(layer: int) -> None:
    name = f"past_key_values.{layer}.value"
    pruned, report = prune_graph(_passing_through(name), [Deletion(layer, "attention")])
    (deleted,) = report.deleted
    assert deleted.inputs_removed == (f"past_key_values.{layer}.key",)
    assert name in [value.name for value in pruned.graph.inputs]
    assert name in [value.name for value in pruned.graph.outputs]


def test_renumbering_takes_no_name_that_another_value_has() -> None:
    model = _passing_through("past_key_values.0.value")
    with pytest.raises(SurgeryError, match="another value is named"):
        prune_graph(model, ATTENTION, renumber_kv=True)
    pruned, _ = prune_graph(model, [Deletion(1, "attention")], renumber_kv=True)
    assert len(pruned.graph.inputs) == len(model.graph.inputs) - 2


def test_a_body_that_reads_what_nothing_gives_is_refused() -> None:
    proto = graph("pre_norm")
    node = onnx.NodeProto(op_type="If", name="choice", output=["unused"])
    node.input.append(proto.graph.input[1].name)
    body = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
    body.name = "body"
    body.node.add(name="inner", op_type="Neg", input=["nowhere"], output=["given"])
    body.output.add(name="given")
    proto.graph.node.append(node)
    (refusal,) = find_sites(_model(proto))
    assert isinstance(refusal, Refusal)
    assert refusal.node == "inner"
    assert (refusal.code, "'nowhere'" in refusal.reason) == ("value-missing", True)
    with pytest.raises(SurgeryError, match="nowhere"):
        prune_graph(_model(proto), ATTENTION)


@pytest.mark.parametrize("bits", [0, -4, 3])
def test_a_number_of_bits_that_is_none_changes_no_count(bits: int) -> None:
    model = _model(graph("genai_int4"))
    node = next(node for node in model.graph if node.op_type == "MatMulNBits")
    packed = node.inputs[1]
    assert packed is not None
    assert packed.const_value is not None
    size = packed.const_value.size
    assert parameters(packed) == 2 * size
    node.attributes["bits"] = ir.AttrInt64("bits", bits)
    assert parameters(packed) == 2 * size
    assert find_sites(model)
