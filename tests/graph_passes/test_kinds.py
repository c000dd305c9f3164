"""What a branch is, told by its operators; what can't be told is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graph_support import oracle_error, sites_of

from graph_passes import Deletion, Refusal, find_sites, prune_graph
from tests.tiny_graphs import HIDDEN, INNER, TinySpec, _Builder

USUAL = [(layer, kind) for layer in range(3) for kind in ("attention", "mlp")]


def _kinds(model: ir.Model) -> list[tuple[int, str]]:
    return [(site.layer, site.kind) for site in sites_of(model)]


def _refusal(model: ir.Model) -> Refusal:
    (refusal,) = find_sites(model)
    assert isinstance(refusal, Refusal)
    return refusal


def _experts(builder: _Builder, x: ir.Value, op_type: str, domain: str) -> ir.Value:
    node = ir.Node(domain, op_type, [x, builder._weight(HIDDEN, HIDDEN)])
    builder._nodes.append(node)
    return node.outputs[0]


class _SharedExpert(_Builder):
    def _mlp(self, x: ir.Value, layer: int) -> list[ir.Value]:
        return [*super()._mlp(x, layer), _experts(self, x, "MoE", "com.microsoft")]


class _OnlyExperts(_Builder):
    def _mlp(self, x: ir.Value, layer: int) -> list[ir.Value]:
        return [_experts(self, x, "QMoE", "com.microsoft")]


@pytest.mark.parametrize("builder", [_SharedExpert, _OnlyExperts])
def test_fused_experts_are_an_mlp_and_go_whole(builder: type[_Builder]) -> None:
    model = builder(TinySpec(annotated=False), 0).build()
    assert _kinds(model) == USUAL
    pruned, _ = prune_graph(model, [Deletion(0, "mlp"), Deletion(2, "mlp")])
    assert sum("MoE" in node.op_type for node in pruned.graph) == 1


class _OwnOperator(_Builder):
    def _mlp(self, x: ir.Value, layer: int) -> list[ir.Value]:
        return [_experts(self, x, "Whatever", "my.own")]


def test_an_unknown_operator_may_be_any_kind_of_sublayer() -> None:
    refusal = _refusal(_OwnOperator(TinySpec(), 0).build())
    assert (refusal.code, "Whatever" in refusal.reason) == ("unknown-kind", True)


class _Convolution(_Builder):
    window = 1

    def _mlp(self, x: ir.Value, layer: int) -> list[ir.Value]:
        turned = self._op("Transpose", x, perm=[0, 2, 1])
        pads = [self.window // 2] * 2
        inner = self._op("Conv", turned, self._weight(INNER, HIDDEN, self.window), pads=pads)
        back = self._op("Conv", self._op("Relu", inner), self._weight(HIDDEN, INNER, 1))
        return [self._op("Transpose", back, perm=[0, 2, 1])]


class _WideConvolution(_Convolution):
    window = 3


class _ConvolutionFirst(_WideConvolution):
    """Layers of mixer and MLP, with one attention in the last."""

    def _attention(self, x: ir.Value, layer: int) -> list[ir.Value]:
        return super()._attention(x, layer) if layer == 2 else self._mlp(x, -1)

    def _mlp(self, x: ir.Value, layer: int) -> list[ir.Value]:
        return super()._mlp(x, layer) if layer < 0 else _Builder._mlp(self, x, layer)


def test_an_mlp_of_convolutions_over_one_token_is_an_mlp() -> None:
    model = _Convolution(TinySpec(), 0).build()
    assert _kinds(model) == USUAL
    assert oracle_error(model, [Deletion(1, "mlp")]) < 1e-6


def test_an_mlp_with_a_wide_convolution_could_be_a_mixer() -> None:
    assert _refusal(_WideConvolution(TinySpec(), 0).build()).code == "ambiguous-mixer"


def test_a_convolution_that_begins_a_layer_is_a_mixer() -> None:
    model = _ConvolutionFirst(TinySpec(cache=False), 0).build()
    mixed = [(layer, kind) for layer in range(2) for kind in ("mixer", "mlp")]
    assert _kinds(model) == [*mixed, *USUAL[4:]]


class _QuantisedRouter(_Builder):
    def _mlp(self, x: ir.Value, layer: int) -> list[ir.Value]:
        (made,) = super()._mlp(x, layer)
        node = ir.Node("", "DynamicQuantizeLinear", [x], num_outputs=3)
        self._nodes.append(node)
        codes, scale, zero = node.outputs
        weight = self._constant(np.ones((HIDDEN, 4), np.uint8))
        scores = self._op("MatMulInteger", codes, weight, zero, self._constant(np.uint8(0)))
        scores = self._op("Mul", self._op("Cast", scores, to=ir.DataType.FLOAT.value), scale)
        chosen = self._op("ReduceMax", self._op("Softmax", scores), self._constant(np.array([-1])))
        return [self._op("Mul", made, chosen)]


def test_a_quantised_router_makes_no_attention() -> None:
    model = _QuantisedRouter(TinySpec(), 0).build()
    assert _kinds(model) == USUAL
    assert oracle_error(model, [Deletion(1, "mlp")]) == 0.0


class _OtherWeights(_Builder):
    """Layer 1's attention weighs its values by something else than a Softmax."""

    steps = False
    _layer_number = 0

    def _plain_attention(self, *heads: Any) -> ir.Value:
        self._layer_number = heads[-1]
        return super()._plain_attention(*heads)

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        if op_type != "Softmax" or self._layer_number != 1:
            return super()._op(op_type, *inputs, **attributes)
        if not self.steps:
            return super()._op("Sigmoid", *inputs)
        exponent = super()._op("Exp", *inputs)
        total = super()._op("ReduceSum", exponent, self._constant(np.array([-1])))
        return super()._op("Div", exponent, total)


class _SoftmaxInSteps(_OtherWeights):
    steps = True


@pytest.mark.parametrize("builder", [_OtherWeights, _SoftmaxInSteps])
def test_attention_is_known_without_a_softmax(builder: type[_Builder]) -> None:
    assert _kinds(builder(TinySpec(), 0).build()) == USUAL


class _PickedExperts(_Builder):
    """The experts' weights are gathered, so no factor is a constant."""

    pick = "Gather"

    def _mlp(self, x: ir.Value, layer: int) -> list[ir.Value]:
        scores = self._op("Softmax", self._op("MatMul", x, self._weight(HIDDEN, 4)))
        best = self._op("ArgMax", self._op("ReduceMax", scores, self._constant(np.array([0, 1]))))
        inner = x
        for _ in range(2):
            weight = self._op(self.pick, self._weight(4, HIDDEN, HIDDEN), best)
            weight = self._op("Reshape", weight, self._constant(np.array([HIDDEN, HIDDEN])))
            inner = self._op("MatMul", self._op("Relu", inner), weight)
        return [inner]


class _PickedByTuples(_PickedExperts):
    pick = "GatherND"


@pytest.mark.parametrize("builder", [_PickedExperts, _PickedByTuples])
def test_products_with_picked_weights_make_no_attention(builder: type[_Builder]) -> None:
    assert _kinds(builder(TinySpec(annotated=False), 0).build()) == USUAL
