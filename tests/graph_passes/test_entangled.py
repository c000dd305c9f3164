"""Branches that others read, in every way that a value can be read."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graph_support import oracle_error, sites_of, tiny

from graph_passes import Deletion, Refusal, SurgeryError, find_sites, prune_graph
from tests.raising import raises
from tests.tiny_graphs import HIDDEN, INNER, TinySpec, _Builder


def _node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def _value(model: ir.Model, name: str) -> ir.Value:
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def _refused(model: ir.Model) -> list[tuple[int | None, str | None]]:
    return [(r.layer, r.kind) for r in find_sites(model) if isinstance(r, Refusal)]


def _publish(model: ir.Model, node: ir.Node, name: str, *dims: int | str) -> None:
    value = node.outputs[0]
    value.name, value.shape = name, ir.Shape(dims)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(node)
    model.graph.outputs.append(value)


class _Nested(_Builder):
    """x + a + mlp(norm(a)): the MLP reads what attention computes."""

    def _parallel_layer(self, x: ir.Value, layer: int) -> ir.Value:
        (attention,) = self._attention(self._norm(x), layer)
        (mlp,) = self._mlp(self._norm(attention), layer)
        return self._op("Add", self._op("Add", x, attention), mlp)


def test_a_branch_that_another_of_the_sum_reads_is_refused() -> None:
    model = _Nested(TinySpec(form="parallel_in_turn"), 0).build()
    assert _refused(model) == [(layer, "attention") for layer in range(3)]
    assert [site.kind for site in sites_of(model)] == ["mlp"] * 3
    assert oracle_error(model, [Deletion(1, "mlp")]) == 0.0


class _SharedProjection(_Builder):
    """Parallel branches with one product for the first projections of both."""

    def _parallel_layer(self, x: ir.Value, layer: int) -> ir.Value:
        joined = self._op("MatMul", self._norm(x), self._weight(HIDDEN, 2 * HIDDEN))
        split = ir.Node("", "Split", [joined], [ir.AttrInt64("axis", -1)], num_outputs=2)
        split.attributes["num_outputs"] = ir.AttrInt64("num_outputs", 2)
        self._nodes.append(split)
        (attention,) = self._attention(split.outputs[0], layer)
        mlp = self._op("MatMul", self._op("Relu", split.outputs[1]), self._weight(HIDDEN, HIDDEN))
        return self._op("Add", self._op("Add", attention, mlp), x)


def test_branches_may_share_their_first_product() -> None:
    model = _SharedProjection(TinySpec(form="parallel"), 0).build()
    assert len(sites_of(model)) == len(find_sites(model)) == 6
    for deletion in (Deletion(1, "mlp"), Deletion(1, "attention")):
        assert oracle_error(model, [deletion]) == 0.0


def test_a_branch_that_decides_a_truth_value_is_refused() -> None:
    model = tiny("pre_norm")
    sites = sites_of(model)
    last = _node(model, sites[5].residual_add)
    zero = ir.node("Constant", [], {"value": ir.tensor(np.float32(0))})
    truth = ir.node("Greater", [_value(model, sites[0].branches[0]), zero.outputs[0]], name="truth")
    chosen = ir.node("Where", [truth.outputs[0], last.inputs[1], zero.outputs[0]])
    model.graph.insert_before(last, [zero, truth, chosen])
    last.replace_input_with(1, chosen.outputs[0])
    assert _refused(model) == [(0, "attention")]
    with raises(SurgeryError, "read-elsewhere", "'truth'"):
        prune_graph(model, [Deletion(0, "attention")])


def test_a_truth_value_within_the_branch_is_none_of_the_others_business() -> None:
    model = tiny("pre_norm")
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    weights = softmax.outputs[0]
    zero = ir.node("Constant", [], {"value": ir.tensor(np.float32(0))})
    broken = ir.node("IsNaN", [weights])
    safe = ir.node("Where", [broken.outputs[0], zero.outputs[0], weights])
    safe.outputs[0].type = weights.type
    model.graph.insert_after(softmax, [zero, broken, safe])
    for user, slot in list(weights.uses()):
        if user not in (broken, safe):
            user.replace_input_with(slot, safe.outputs[0])
    assert len(sites_of(model)) == len(find_sites(model)) == 6
    assert oracle_error(model, [Deletion(0, "attention")]) == 0.0


@pytest.mark.parametrize("index", [0, 5])
def test_an_output_that_mixes_a_branch_with_the_stream_is_refused(index: int) -> None:
    model = tiny("pre_norm")
    sites = sites_of(model)
    branch = _value(model, sites[2].branches[0])
    other = _node(model, sites[index].residual_add).outputs[0]
    mixed = ir.node("Concat", [branch, other], {"axis": -1}, name="mix")
    _publish(model, mixed, "mixed", "batch", "seq", 2 * HIDDEN)
    assert _refused(model) == [(1, "attention")]
    with raises(SurgeryError, "shared-output", "'mixed'"):
        prune_graph(model, [Deletion(1, "attention")])


def test_an_output_of_the_branch_alone_goes_with_it() -> None:
    model = tiny("pre_norm")
    branch = _value(model, sites_of(model)[0].branches[0])
    _publish(model, ir.node("Add", [branch, branch], name="probe"), "twice", "batch", "seq", HIDDEN)
    assert len(sites_of(model)) == 6
    assert "twice" in sites_of(model)[0].kv_outputs
    assert oracle_error(model, [Deletion(0, "attention")]) == 0.0


class _TwicePerLayer(_Builder):
    def _mlp(self, x: ir.Value, layer: int) -> list[ir.Value]:
        inner = self._op("Relu", self._op("MatMul", x, self._weight(HIDDEN, INNER)))
        return [self._op("MatMul", inner, self._weight(INNER, HIDDEN))] * 2


def test_a_branch_that_joins_twice_is_refused() -> None:
    model = _TwicePerLayer(TinySpec(form="split_mlp"), 0).build()
    assert _refused(model) == [(layer, "mlp") for layer in range(3)]


class _Stacked(_Builder):
    """Two streams in one tensor; each layer works on the first and mixes both."""

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        if layer == 0:
            x = self._stack(x, self._op("MatMul", x, self._weight(HIDDEN, HIDDEN)))
        one, other = (self._op("Gather", x, self._constant(np.int64(i))) for i in range(2))
        one = super()._layer(one, layer)
        stack = self._stack(one, self._op("Tanh", self._op("Add", one, other)))
        if layer < self._spec.layers - 1:
            return stack
        return self._op("ReduceMean", stack, self._constant(np.array([0])), keepdims=0)

    def _stack(self, *streams: ir.Value) -> ir.Value:
        first = self._constant(np.array([0]))
        return self._op("Concat", *(self._op("Unsqueeze", x, first) for x in streams), axis=0)


class _SideBySide(_Builder):
    """Two streams that each layer works on in turn, and that meet at the end."""

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        self._other = getattr(self, "_other", x)
        (attention,) = self._attention(self._norm(x), layer)
        self._other = self._op("Mul", self._other, attention)
        (mlp,) = self._mlp(self._norm(self._other), layer)
        made = self._op("Mul", x, mlp)
        return made if layer < 2 else self._op("Mul", made, self._other)


class _Interpolated(_Builder):
    """One stream, but ``f(x) * x`` in the place of ``x + f(x)``."""

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        (attention,) = self._attention(self._norm(x), layer)
        return self._op("Mul", x, attention)


@pytest.mark.parametrize(
    ("builder", "code"),
    [
        (_Stacked, "several-streams"),
        (_SideBySide, "several-streams"),
        (_Interpolated, "hidden-sublayer"),
    ],
)
def test_what_is_no_single_stream_is_refused_for_that_reason(
    builder: type[_Builder], code: str
) -> None:
    (refusal,) = find_sites(builder(TinySpec(cache=False), 0).build())
    assert isinstance(refusal, Refusal)
    assert refusal.code == code
