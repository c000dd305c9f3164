"""The finder: what is a sublayer, which layer and kind it is, and what can't be told is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes import Deletion, find_sites, prune_graph
from tests.graph_passes.fused_graphs import FUSED
from tests.graph_passes.graph_support import (
    GRAPHS,
    all_deletions,
    check_refused,
    kinds,
    oracle_error,
    sites_of,
    text,
    tiny,
    usual,
)
from tests.tiny_graphs import HIDDEN, INNER, TinySpec, _Builder, tiny_model

WINDOW = 3
FOUND: list[Any] = []
REFUSED: list[Any] = []


def found(
    expected: Sequence[tuple[int, str]] = usual(), *, runs: bool = True, **spec: Any
) -> Callable[[type[_Builder]], type[_Builder]]:
    """A model of this class shows these sublayers; of one that runs each can be cut."""

    def note(builder: type[_Builder]) -> type[_Builder]:
        FOUND.append(pytest.param(builder, TinySpec(**spec), expected, runs, id=builder.__name__))
        return builder

    return note


def refused(
    code: str, places: Sequence[tuple[int, str]] = (), field: str = "", **spec: Any
) -> Callable[[type[_Builder]], type[_Builder]]:
    """Of a model of this class some sublayers, or the whole, are refused."""

    def note(builder: type[_Builder]) -> type[_Builder]:
        case = (builder, TinySpec(**spec), code, places, field)
        REFUSED.append(pytest.param(*case, id=builder.__name__))
        return builder

    return note


# How a sublayer joins the stream


class Odd(_Builder):
    """Layer 1 joins the stream in a form of its own."""

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        if layer != 1:
            return super()._layer(x, layer)
        for make in (self._attention, self._mlp):
            (branch,) = make(self._norm(x), layer)
            x = self.join(x, branch)
        return x

    def join(self, skip: ir.Value, branch: ir.Value) -> ir.Value:
        raise NotImplementedError


@found()
class BehindIdentity(Odd):
    def join(self, skip: ir.Value, branch: ir.Value) -> ir.Value:
        return self._op("Add", self._op("Identity", skip), branch)


@found()
class InDouble(Odd):
    def join(self, skip: ir.Value, branch: ir.Value) -> ir.Value:
        double, single = ir.DataType.DOUBLE.value, ir.DataType.FLOAT.value
        operands = [self._op("Cast", value, to=double) for value in (skip, branch)]
        return self._op("Cast", self._op("Add", *operands), to=single)


@refused("hidden-sublayer")
class Scaled(Odd):
    """The stream is scaled, so that no numbers may shift."""

    def join(self, skip: ir.Value, branch: ir.Value) -> ir.Value:
        return self._op("Add", *(self._op("Mul", x, self._number(0.5)) for x in (skip, branch)))


@refused("hidden-sublayer")
class BySum(Odd):
    def join(self, skip: ir.Value, branch: ir.Value) -> ir.Value:
        return self._op("Sum", skip, branch)


@found(usual(1), runs=False, layers=1, annotated=False)
class ManyExperts(_Builder):
    """A sum of many parts."""

    def _mlp(self, x: ir.Value, layer: int) -> list[ir.Value]:
        hidden = self._op("MatMul", x, self._weight(HIDDEN, HIDDEN))
        total = hidden
        for _ in range(1200):
            total = self._op("Add", total, self._op("Relu", hidden))
        return [total]


@found(form="pre_norm", annotated=False)
@found(form="post_norm", annotated=False)
class NormInSteps(_Builder):
    """Norms that take a mean themselves; none of them is a skip that broadcasts."""

    def _norm(self, x: ir.Value) -> ir.Value:
        mean = self._op("ReduceMean", x, self._constant(np.array([-1])))
        return super()._norm(self._op("Sub", x, mean))


@refused("unknown-shape", [(1, "attention")], cache=False, annotated=False)
class MeanSkip(_Builder):
    """Layer 1's skip is a mean over all tokens, which broadcasts back in the sum."""

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        if layer != 1:
            return super()._layer(x, layer)
        mean = self._op("ReduceMean", x, self._constant(np.array([1])))
        whole = self._op("Expand", mean, self._op("Shape", x))
        (attention,) = self._attention(self._norm(whole), layer)
        return self._op("Add", mean, attention)


# Branches that have to do with each other


@refused("read-elsewhere", [(n, "attention") for n in range(3)], form="parallel_in_turn")
class Nested(_Builder):
    """x + a + mlp(norm(a)): the MLP reads what attention computes."""

    def _parallel_layer(self, x: ir.Value, layer: int) -> ir.Value:
        (attention,) = self._attention(self._norm(x), layer)
        (mlp,) = self._mlp(self._norm(attention), layer)
        return self._op("Add", self._op("Add", x, attention), mlp)


@found(form="parallel")
class SharedProjection(_Builder):
    """Parallel branches with one product for the first projections of both."""

    def _parallel_layer(self, x: ir.Value, layer: int) -> ir.Value:
        joined = self._op("MatMul", self._norm(x), self._weight(HIDDEN, 2 * HIDDEN))
        split = ir.Node("", "Split", [joined], [ir.AttrInt64("axis", -1)], num_outputs=2)
        split.attributes["num_outputs"] = ir.AttrInt64("num_outputs", 2)
        first, second = self._add(split)
        (attention,) = self._attention(first, layer)
        mlp = self._op("MatMul", self._op("Relu", second), self._weight(HIDDEN, HIDDEN))
        return self._op("Add", self._op("Add", attention, mlp), x)


@refused("joined-twice", [(n, "mlp") for n in range(3)], form="split_mlp")
class TwicePerLayer(_Builder):
    """One branch joins the sum twice."""

    def _mlp(self, x: ir.Value, layer: int) -> list[ir.Value]:
        inner = self._op("Relu", self._op("MatMul", x, self._weight(HIDDEN, INNER)))
        return [self._op("MatMul", inner, self._weight(INNER, HIDDEN))] * 2


@refused("several-streams", cache=False)
class Stacked(_Builder):
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


@refused("several-streams", cache=False)
class SideBySide(_Builder):
    """Two streams that each layer works on in turn, and that meet at the end."""

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        self._other = getattr(self, "_other", x)
        (attention,) = self._attention(self._norm(x), layer)
        self._other = self._op("Mul", self._other, attention)
        (mlp,) = self._mlp(self._norm(self._other), layer)
        made = self._op("Mul", x, mlp)
        return made if layer < 2 else self._op("Mul", made, self._other)


@refused("hidden-sublayer", cache=False)
class Interpolated(_Builder):
    """One stream, but ``f(x) * x`` in the place of ``x + f(x)``."""

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        (attention,) = self._attention(self._norm(x), layer)
        return self._op("Mul", x, attention)


# What an MLP may be made of


class Experts(_Builder):
    """A fused operator in the MLP's place or beside it."""

    operator, domain, beside = "QMoE", "com.microsoft", False

    def _mlp(self, x: ir.Value, layer: int) -> list[ir.Value]:
        node = ir.Node(self.domain, self.operator, [x, self._weight(HIDDEN, HIDDEN)])
        made = [*self._add(node)]
        return [*super()._mlp(x, layer), *made] if self.beside else made


@found(runs=False, annotated=False)
class OnlyExperts(Experts):
    pass


@found(runs=False, annotated=False)
class SharedExpert(Experts):
    operator, beside = "MoE", True


@refused("unknown-kind", field="Whatever")
class OwnOperator(Experts):
    """An unknown operator may be any kind of sublayer."""

    operator, domain = "Whatever", "my.own"


@found()
class ConvolutionOverOneToken(_Builder):
    window = 1

    def _mlp(self, x: ir.Value, layer: int) -> list[ir.Value]:
        turned = self._op("Transpose", x, perm=[0, 2, 1])
        pads = [self.window // 2] * 2
        inner = self._op("Conv", turned, self._weight(INNER, HIDDEN, self.window), pads=pads)
        back = self._op("Conv", self._op("Relu", inner), self._weight(HIDDEN, INNER, 1))
        return [self._op("Transpose", back, perm=[0, 2, 1])]


@refused("ambiguous-mixer")
class WideConvolution(ConvolutionOverOneToken):
    """This could be a mixer."""

    window = WINDOW


@found([*((n, kind) for n in range(2) for kind in ("mixer", "mlp")), *usual()[4:]], cache=False)
class ConvolutionFirst(WideConvolution):
    """Layers of mixer and MLP, with one attention in the last."""

    def _attention(self, x: ir.Value, layer: int) -> list[ir.Value]:
        return super()._attention(x, layer) if layer == 2 else self._mlp(x, -1)

    def _mlp(self, x: ir.Value, layer: int) -> list[ir.Value]:
        return super()._mlp(x, layer) if layer < 0 else _Builder._mlp(self, x, layer)


@found()
class QuantisedRouter(_Builder):
    def _mlp(self, x: ir.Value, layer: int) -> list[ir.Value]:
        (made,) = super()._mlp(x, layer)
        codes, scale, zero = self._add(ir.Node("", "DynamicQuantizeLinear", [x], num_outputs=3))
        weight = self._constant(np.ones((HIDDEN, 4), np.uint8))
        scores = self._op("MatMulInteger", codes, weight, zero, self._constant(np.uint8(0)))
        scores = self._op("Mul", self._op("Cast", scores, to=ir.DataType.FLOAT.value), scale)
        chosen = self._op("ReduceMax", self._op("Softmax", scores), self._constant(np.array([-1])))
        return [self._op("Mul", made, chosen)]


@found(runs=False, annotated=False)
class PickedExperts(_Builder):
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


@found(runs=False, annotated=False)
class PickedByTuples(PickedExperts):
    pick = "GatherND"


# What an attention, or a mixer, may be made of


@found()
class OtherWeights(_Builder):
    """Layer 1's attention weighs its values by something else than a Softmax."""

    steps = False
    _layer_number = 0

    def _plain_attention(self, *heads: Any) -> ir.Value:
        self._layer_number = heads[-1]
        return super()._plain_attention(*heads)

    def _op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        if op_type != "Softmax" or self._layer_number != 1:
            return super()._op(op_type, *inputs, **attributes)
        if not self.steps:
            return super()._op("Sigmoid", *inputs)
        exponent = super()._op("Exp", *inputs)
        total = super()._op("ReduceSum", exponent, self._constant(np.array([-1])))
        return super()._op("Div", exponent, total)


@found(runs=False)
class SoftmaxInSteps(OtherWeights):
    steps = True


MIXERS = [(layer, kind) for layer in range(3) for kind in ("mixer", "mlp")]


@found(MIXERS, cache=False)
class Convolutions(_Builder):
    """Every layer has a gated convolution of several tokens where attention would be."""

    def _attention(self, x: ir.Value, layer: int) -> list[ir.Value]:
        opened = self._op("MatMul", x, self._weight(HIDDEN, HIDDEN))
        return [self._op("MatMul", self._convolved(opened), self._weight(HIDDEN, HIDDEN))]

    def _convolved(self, x: ir.Value) -> ir.Value:
        turned = self._op("Transpose", x, perm=[0, 2, 1])
        weight = self._weight(HIDDEN, 1, WINDOW)
        made = self._op("Conv", turned, weight, group=HIDDEN, pads=[WINDOW - 1, 0])
        return self._op("Transpose", made, perm=[0, 2, 1])


@refused("no-attention", cache=False)
class OfPictures(Convolutions):
    """The same over floats instead of tokens is no Transformer."""

    def build(self) -> ir.Model:
        model = super().build()
        model.graph.inputs[0].dtype = ir.DataType.FLOAT
        return model


@found(MIXERS, runs=False, cache=False, annotated=False)
class StatefulMixers(Convolutions):
    """One token at a time, with a window of earlier ones and a recurrent state per layer."""

    def _convolved(self, x: ir.Value) -> ir.Value:
        layer = len(self._outputs) // 2
        past = self._input(f"past_conv.{layer}", "batch", HIDDEN, WINDOW - 1)
        turned = self._op("Transpose", x, perm=[0, 2, 1])
        window = self._op("Concat", past, turned, axis=2)
        made = self._op("Conv", window, self._weight(HIDDEN, 1, WINDOW), group=HIDDEN)
        kept = self._op("Slice", window, *(self._constant(np.array([n])) for n in (1, 9, 2)))
        self._output(kept, f"present_conv.{layer}", "batch", HIDDEN, WINDOW - 1)
        step = self._op("Transpose", made, perm=[0, 2, 1])
        return self._op("MatMul", step, self._recurred(step, layer))

    def _recurred(self, step: ir.Value, layer: int) -> ir.Value:
        """The delta rule: the state forgets what it answers to a key, and learns the value."""
        state = self._input(f"past_recurrent.{layer}", "batch", HIDDEN, HIDDEN)
        lacking = self._op("Sub", step, self._op("MatMul", step, state))
        key = self._op("Transpose", step, perm=[0, 2, 1])
        made = self._op("Add", state, self._op("MatMul", key, lacking))
        self._output(made, f"present_recurrent.{layer}", "batch", HIDDEN, HIDDEN)
        return made


@found([(0, "mixer"), (1, "attention"), (2, "mixer")], runs=False, cache=False, annotated=False)
class WithoutMlp(StatefulMixers):
    """Layers of one sublayer each; a mixer behind an attention is told by its state."""

    stateful = True

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        make = _Builder._attention if layer == 1 else StatefulMixers._attention
        return self._op("Add", x, make(self, self._norm(x), layer)[0])

    def _convolved(self, x: ir.Value) -> ir.Value:
        return super()._convolved(x) if self.stateful else Convolutions._convolved(self, x)


@refused("ambiguous-mixer", cache=False, annotated=False)
class WithoutState(WithoutMlp):
    """Then it might be an MLP with a convolution."""

    stateful = False


@found(form="pre_norm", cache=False)
@found(form="post_norm", cache=False)
class ConvolutionalPositions(_Builder):
    """A convolution over the embeddings, added before the first layer, is no layer."""

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        if layer == 0:
            turned = self._op("Transpose", x, perm=[0, 2, 1])
            weight = self._weight(HIDDEN, HIDDEN, WINDOW)
            made = self._op("Relu", self._op("Conv", turned, weight, pads=[1, 1]))
            x = self._op("Add", x, self._op("Transpose", made, perm=[0, 2, 1]))
        return super()._layer(x, layer)


@found([(0, "mixer"), *((n, kind) for n in (1, 2) for kind in ("attention", "mlp"))], cache=False)
class MixerFirst(Convolutions):
    """The same convolution with products of its own is a mixer; it has no MLP."""

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        if layer == 0:
            return self._op("Add", x, super()._attention(self._norm(x), layer)[0])
        return super()._layer(x, layer)

    def _attention(self, x: ir.Value, layer: int) -> list[ir.Value]:
        return _Builder._attention(self, x, layer)


@pytest.mark.parametrize(("builder", "spec", "expected", "runs"), FOUND)
def test_sublayers_are_told_by_their_operators(
    builder: type[_Builder], spec: TinySpec, expected: list[tuple[int, str]], runs: bool
) -> None:
    model = builder(spec, 0).build()
    sites = find_sites(model)
    assert [(site.layer, site.kind) for site in sites] == expected
    for deletion in all_deletions(model) if runs or expected == usual() else ():
        if runs:
            assert oracle_error(model, [deletion]) <= 1e-6
        elif expected == usual():
            assert len(kinds(prune_graph(model, [deletion])[0])) == 5


@pytest.mark.parametrize(("builder", "spec", "code", "places", "field"), REFUSED)
def test_what_can_not_be_told_or_cut_is_refused(
    builder: type[_Builder], spec: TinySpec, code: str, places: list[tuple[int, str]], field: str
) -> None:
    model = builder(spec, 0).build()
    check_refused(model, code, places, field)
    for deletion in all_deletions(model):
        assert oracle_error(model, [deletion]) == 0.0


@pytest.mark.parametrize("name", GRAPHS)
def test_every_form_shows_each_sublayer_once_and_names_decide_nothing(name: str) -> None:
    model = tiny(name)
    before = text(model)
    expected = [(s.ref, s.parameters, len(s.kv_inputs)) for s in sites_of(model)]
    assert kinds(model) == usual()
    assert len(find_sites(model)) == len(expected)
    assert text(model) == before
    if name in FUSED:
        joints = {node.name: node for node in model.graph if node.op_type.startswith("Skip")}
        assert {site.residual_add for site in sites_of(model)} == set(joints)
        for site in sites_of(model):
            operands = {value.name for value in joints[site.residual_add].inputs[:2] if value}
            assert site.skip in operands
            assert set(site.branches) <= operands or FUSED[name].parallel
    for i, node in enumerate(model.graph):
        node.name = f"mlp.{i}.attention"
        for value in filter(lambda value: value.name, node.outputs):
            value.name = f"self_attn_{i}_{value.index()}"
    for i, value in enumerate(model.graph.inputs):
        value.name = f"mask_{i}"
    assert [(s.ref, s.parameters, len(s.kv_inputs)) for s in sites_of(model)] == expected


def test_a_site_tells_where_it_is_and_what_it_owns() -> None:
    site = sites_of(tiny("pre_norm"))[2]
    assert site.kv_inputs == ("past_key_values.1.key", "past_key_values.1.value")
    assert site.kv_outputs == ("present.1.key", "present.1.value")
    attention, mlp = sites_of(tiny("parallel"))[:2]
    assert attention.residual_add == mlp.residual_add
    parts = sites_of(tiny("split_mlp"))[1]
    assert (len(site.branches), len(parts.branches)) == (1, 2)
    # The norm that parallel branches share belongs to neither.
    assert [s.parameters for s in (site, attention, mlp, parts)] == [
        4 * 8 * 8 + 2 * 8, 4 * 8 * 8, 2 * 8 * 16, 2 * 2 * 8 * 16 + 2 * 8
    ]  # fmt: skip
    assert all(not site.kv_inputs for site in sites_of(tiny("post_norm_encoder")))
    # Tied tables are nobody's, and packed matrices count by their numbers.
    for name, like in (("tied", "pre_norm"), ("genai_int4", "genai")):
        one, other = ([site.parameters for site in sites_of(tiny(form))] for form in (name, like))
        assert one == other


def test_a_pruned_graph_keeps_the_original_numbers_by_its_record() -> None:
    pruned, _ = prune_graph(tiny("pre_norm"), [Deletion(0, "block")])
    assert kinds(pruned) == usual()[2:]
    pruned.metadata_props.clear()
    assert kinds(pruned) == usual(2)


@pytest.mark.parametrize(
    "broken", ["not json", "3", '[{"layer": "x"}]', '[{"kind": "nonsense", "layer": 0}]']
)
def test_an_unreadable_record_is_no_obstacle(broken: str) -> None:
    model = tiny("pre_norm")
    model.metadata_props["depthcut.plan"] = broken
    assert kinds(model) == usual()


def test_deep_graphs_are_found_whole() -> None:
    assert kinds(tiny_model(TinySpec(layers=24, annotated=False))) == usual(24)


def test_weights_are_not_read() -> None:
    model = tiny("pre_norm")
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.ExternalTensor(
            "nowhere.data", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape),
            name=value.name or "", base_dir="/nonexistent",
        )  # fmt: skip
    assert kinds(model) == usual()
    pruned, _ = prune_graph(model, [Deletion(0, "attention"), Deletion(2, "mlp")])
    assert len(pruned.graph.initializers) < len(model.graph.initializers)
