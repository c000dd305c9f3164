"""A sublayer that joins the stream in an unknown form must not be passed over in silence."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from graph_support import all_deletions, oracle_error, sites_of, tiny

from graph_passes import Deletion, Refusal, SurgeryError, find_sites, prune_graph
from tests.raising import raises
from tests.tiny_graphs import HIDDEN, TinySpec, _Builder

Join = Callable[[_Builder, ir.Value, ir.Value], ir.Value]


def _scaled(builder: _Builder, skip: ir.Value, branch: ir.Value) -> ir.Value:
    half = builder._constant(np.float32(0.5))
    return builder._op("Add", builder._op("Mul", skip, half), builder._op("Mul", branch, half))


def _behind_identity(builder: _Builder, skip: ir.Value, branch: ir.Value) -> ir.Value:
    return builder._op("Add", builder._op("Identity", skip), branch)


def _in_double(builder: _Builder, skip: ir.Value, branch: ir.Value) -> ir.Value:
    double, single = ir.DataType.DOUBLE.value, ir.DataType.FLOAT.value
    operands = [builder._op("Cast", value, to=double) for value in (skip, branch)]
    return builder._op("Cast", builder._op("Add", *operands), to=single)


def _by_sum(builder: _Builder, skip: ir.Value, branch: ir.Value) -> ir.Value:
    return builder._op("Sum", skip, branch)


class _OddLayer(_Builder):
    """Layer 1 joins the stream in a form of its own."""

    join: Join

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        if layer != 1:
            return super()._layer(x, layer)
        for make in (self._attention, self._mlp):
            (branch,) = make(self._norm(x), layer)
            x = self.join(self, x, branch)
        return x


@pytest.mark.parametrize("join", [_behind_identity, _in_double])
def test_a_skip_in_another_form_is_found(join: Join) -> None:
    odd = type("_Odd", (_OddLayer,), {"join": staticmethod(join)})
    model = odd(TinySpec(), 0).build()
    everything = all_deletions(model)
    assert len(everything) == 6
    for deletion in everything:
        assert oracle_error(model, [deletion]) == 0.0


@pytest.mark.parametrize("join", [_scaled, _by_sum])
def test_a_layer_that_joins_in_another_form_shifts_no_numbers(join: Join) -> None:
    odd = type("_Odd", (_OddLayer,), {"join": staticmethod(join)})
    model = odd(TinySpec(), 0).build()
    (refusal,) = find_sites(model)
    assert isinstance(refusal, Refusal)
    assert refusal.code == "hidden-sublayer"
    assert refusal.node
    with raises(SurgeryError, "sublayer-missing", "attention 1", refusal.node):
        prune_graph(model, [Deletion(1, "attention")])


def test_a_quantised_head_is_no_hidden_work() -> None:
    model = tiny("post_norm_encoder")
    head = model.graph.outputs[0].producer()
    assert head is not None
    quantise = ir.Node("", "DynamicQuantizeLinear", [head.inputs[0]], num_outputs=3)
    for i, value in enumerate(quantise.outputs):
        value.name = f"quantised{i}"
    weight = ir.Value(
        name="head8", const_value=ir.tensor(np.ones((HIDDEN, 11), np.uint8)),
        type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape([HIDDEN, 11]),
    )  # fmt: skip
    model.graph.register_initializer(weight)
    codes, scale, zero = quantise.outputs
    product = ir.node("MatMulInteger", [codes, weight, zero])
    cast = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT.value})
    logits = ir.node("Mul", [cast.outputs[0], scale])
    old = model.graph.outputs[0]
    logits.outputs[0].type, logits.outputs[0].shape = old.type, old.shape
    model.graph.extend([quantise, product, cast, logits])
    model.graph.outputs[0] = logits.outputs[0]
    old.name, logits.outputs[0].name = "unused", "logits"
    assert len(sites_of(model)) == 6
    assert oracle_error(model, [Deletion(1, "mlp")]) == 0.0


class _ManyExperts(_Builder):
    def _mlp(self, x: ir.Value, layer: int) -> list[ir.Value]:
        hidden = self._op("MatMul", x, self._weight(HIDDEN, HIDDEN))
        total = hidden
        for _ in range(1200):
            total = self._op("Add", total, self._op("Relu", hidden))
        return [total]


def test_a_sum_of_many_parts_is_taken_apart() -> None:
    model = _ManyExperts(TinySpec(layers=1, annotated=False), 0).build()
    assert [(site.layer, site.kind) for site in sites_of(model)] == [(0, "attention"), (0, "mlp")]
