"""A decoder's caller may choose of how many last positions there are logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graph_support import session

from graph_passes import Deletion, prune_graph
from graph_passes.fusing.logits_to_keep import KEEP, LogitsToKeepPass
from tests.graph_passes.fused_graphs import FusedSpec, fused_feed, fused_model

SEQ = 5
Arrays = dict[str, np.ndarray[Any, Any]]


def logits(model: ir.Model, feed: Arrays) -> np.ndarray[Any, Any]:
    return np.asarray(session(model, optimise=True).run(["logits"], feed)[0])


def kept(model: ir.Model) -> ir.Model:
    copy = model.clone()
    assert LogitsToKeepPass()(copy).modified
    return copy


def after_head(model: ir.Model, *operators: Callable[[ir.Value], ir.Node]) -> ir.Model:
    """With further operators behind the head."""
    graph = model.graph
    value = graph.outputs[0]
    value.name = "raw"
    for operator in operators:
        node = operator(value)
        graph.append(node)
        value = node.outputs[0]
        value.dtype, value.shape = ir.DataType.FLOAT, graph.outputs[0].shape
    value.name, graph.outputs[0] = "logits", value
    return model


def cap(value: ir.Value) -> ir.Node:
    return ir.node("Tanh", [value])


def doubled(value: ir.Value) -> ir.Node:
    return ir.node("Add", [value, value])


def without_length(value: ir.Value) -> ir.Node:
    return ir.node("ReduceMax", [value], attributes={"keepdims": 1})


MODELS = {
    "plain": lambda: fused_model(FusedSpec()),
    "softcap": lambda: after_head(fused_model(FusedSpec()), cap),
    "int4": lambda: fused_model(FusedSpec(int4=True)),
    "cut": lambda: prune_graph(kept(fused_model(FusedSpec())), [Deletion(1, "attention")])[0],
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("past", [0, 3])
def test_the_last_positions_are_those_of_all(name: str, past: int) -> None:
    plain = MODELS[name]()
    model = plain if name == "cut" else kept(plain)
    feed = fused_feed(plain, seq=SEQ if past == 0 else 1, past=past)
    feed.pop(KEEP, None)
    everything = logits(model, feed)
    if name != "cut":
        assert np.array_equal(everything, logits(plain, feed))
    length = everything.shape[1]
    for count in (1, 2, length, length + 3):
        few = logits(model, {**feed, KEEP: np.array([count])})
        assert few.shape[1] == min(count, length)
        assert np.abs(few - everything[:, -count:]).max() <= 1e-5
    if length > 1:
        assert np.abs(everything[:, :1] - everything[:, -1:]).max() > 1e-2


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["plain", "softcap", "int4"])
def test_without_a_choice_it_gives_a_fixed_number(name: str, count: int) -> None:
    plain = MODELS[name]()
    model = plain.clone()
    assert LogitsToKeepPass(count)(model).modified
    assert {v.name for v in model.graph.inputs} == {v.name for v in plain.graph.inputs}
    assert model.graph.outputs[0].shape[1] == count
    feed = fused_feed(plain, seq=SEQ)
    result, everything = logits(model, feed), logits(plain, feed)
    assert result.shape[1] == count < everything.shape[1]
    assert np.abs(result - everything[:, -count:]).max() <= 1e-5


def test_the_cut_keeps_the_choice() -> None:
    model, _ = prune_graph(kept(fused_model(FusedSpec())), [Deletion(0, "block")])
    assert KEEP in {value.name for value in model.graph.inputs} & set(model.graph.initializers)


@pytest.mark.parametrize("operator", [doubled, without_length])
def test_a_head_that_is_no_plain_product_stays(operator: Callable[[ir.Value], ir.Node]) -> None:
    model = after_head(fused_model(FusedSpec()), operator)
    before = ir.to_proto(model).SerializeToString()
    assert not LogitsToKeepPass()(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_a_second_time_changes_nothing() -> None:
    model = kept(fused_model(FusedSpec()))
    before = ir.to_proto(model).SerializeToString()
    assert not LogitsToKeepPass()(model).modified
    assert ir.to_proto(model).SerializeToString() == before
    headless = fused_model(FusedSpec())
    headless.graph.outputs[0].name = "last_hidden_state"
    assert not LogitsToKeepPass()(headless).modified
