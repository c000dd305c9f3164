"""What can't be cut safely is refused, with the place and the reason; its twin is cut.

And what of a branch must not stay: which inputs and outputs are its cache, who else needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes import Deletion, find_sites, prune_graph
from graph_passes.testing import masked_model
from tests.graph_passes.fused_graphs import FUSED, fused_model
from tests.graph_passes.graph_support import (
    all_deletions,
    check_refused,
    kinds,
    largest_difference,
    node_of,
    operators,
    oracle_error,
    pruned_soundly,
    publish,
    put_behind,
    refusals,
    run,
    sites_of,
    tiny,
    usual,
    value_of,
)
from tests.graph_passes.test_finding import StatefulMixers
from tests.tiny_graphs import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    TinySpec,
    _Builder,
    declared,
    tiny_feed,
    tiny_model,
)

Spoil = Callable[[ir.Model], object]
REFUSED: list[Any] = []
ALLOWED: list[Any] = []


def refused(
    code: str,
    places: Sequence[tuple[int, str]] = (),
    field: str = "",
    *,
    form: str = "pre_norm",
    runs: bool = True,
) -> Callable[[Spoil], Spoil]:
    """After this change some sublayers, or the whole graph, are refused."""

    def note(spoil: Spoil) -> Spoil:
        REFUSED.append(pytest.param(spoil, code, places, field, form, runs, id=spoil.__name__))
        return spoil

    return note


def allowed(form: str = "pre_norm", *, runs: bool = True) -> Callable[[Spoil], Spoil]:
    """After this change all is as before."""

    def note(spoil: Spoil) -> Spoil:
        ALLOWED.append(pytest.param(spoil, form, runs, id=spoil.__name__))
        return spoil

    return note


def branch_of(model: ir.Model, number: int) -> ir.Value:
    return value_of(model, sites_of(model)[number].branches[0])


def sum_of(model: ir.Model, number: int) -> ir.Node:
    return node_of(model, sites_of(model)[number].residual_add)


def constant(model: ir.Model, name: str, data: Any) -> ir.Value:
    tensor = ir.tensor(np.asarray(data), name=name)
    value = declared(name, tensor.dtype, *tensor.shape.numpy())
    value.const_value = tensor
    model.graph.register_initializer(value)
    return value


# Branches that others read


@refused("read-elsewhere", [(0, "attention")], "the_reader")
def read_by_another(model: ir.Model) -> None:
    last = sum_of(model, 5)
    reader = ir.node("Mul", [last.inputs[1], branch_of(model, 0)], name="the_reader")
    model.graph.insert_before(last, reader)
    last.replace_input_with(1, reader.outputs[0])


@refused("read-elsewhere", [(0, "attention")], "truth")
def a_truth_value_is_decided(model: ir.Model) -> None:
    last, zero = sum_of(model, 5), constant(model, "zero", np.float32(0))
    truth = ir.node("Greater", [branch_of(model, 0), zero], name="truth")
    chosen = ir.node("Where", [truth.outputs[0], last.inputs[1], zero])
    model.graph.insert_before(last, [truth, chosen])
    last.replace_input_with(1, chosen.outputs[0])


@allowed()
def a_truth_value_within_the_branch(model: ir.Model) -> None:
    weights = next(node for node in model.graph if node.op_type == "Softmax").outputs[0]
    broken = ir.node("IsNaN", [weights])
    safe = ir.node("Where", [broken.outputs[0], constant(model, "zero", np.float32(0)), weights])
    safe.outputs[0].type = weights.type
    put_behind(model, weights, broken, safe)


@refused("read-elsewhere", [(0, "attention")])
def another_layer_uses_the_keys(model: ir.Model) -> None:
    keys = [value for value in model.graph.outputs if (value.name or "").endswith("key")]
    for user, slot in list(keys[2].uses()):
        user.replace_input_with(slot, keys[0])


@refused("shared-output", [(n, "attention") for n in range(3)], "'presents'")
def caches_are_stacked(model: ir.Model) -> None:
    stacked = ir.node("Concat", list(model.graph.outputs[1:]), {"axis": 0}, name="stack")
    del model.graph.outputs[1:]
    model.graph.append(stacked)
    publish(model, stacked.outputs[0], "presents", "all", HEADS, "total", HEAD_DIM)


def mix(model: ir.Model, number: int) -> None:
    other = sum_of(model, number).outputs[0]
    mixed = ir.node("Concat", [branch_of(model, 2), other], {"axis": -1}, name="mix")
    model.graph.append(mixed)
    publish(model, mixed.outputs[0], "mixed", "batch", "seq", 2 * HIDDEN)


@refused("shared-output", [(1, "attention")], "'mixed'")
def an_output_mixes_a_branch_with_the_stream_before(model: ir.Model) -> None:
    mix(model, 0)


@refused("shared-output", [(1, "attention")], "'mixed'")
def an_output_mixes_a_branch_with_the_stream_behind(model: ir.Model) -> None:
    mix(model, 5)


@allowed()
def an_output_of_the_branch_alone(model: ir.Model) -> None:
    branch = branch_of(model, 0)
    probe = ir.node("Add", [branch, branch], name="probe")
    model.graph.append(probe)
    publish(model, probe.outputs[0], "twice", "batch", "seq", HIDDEN)
    assert "twice" in sites_of(model)[0].kv_outputs


@refused("sum-of-branches", [(0, "attention")], form="parallel")
def a_sum_of_parallel_branches_is_public(model: ir.Model) -> None:
    names = {name for site in sites_of(model)[:2] for name in site.branches}
    (inner,) = (n for n in model.graph if {v.name for v in n.inputs if v} == names)
    model.graph.outputs.append(inner.outputs[0])


@refused("broadcast-skip", [(1, "attention")], form="post_norm_encoder", runs=False)
def a_skip_only_broadcasts(model: ir.Model) -> None:
    site, add = sites_of(model)[2], sum_of(model, 2)
    skip = value_of(model, site.skip)
    mean = ir.node("ReduceMean", [skip, constant(model, "axis", [1])], name="mean")
    mean.outputs[0].shape = ir.Shape(["batch", 1, HIDDEN])
    mean.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    put_behind(model, skip, mean)
    for value in (value_of(model, site.branches[0]), add.outputs[0]):
        value.shape = ir.Shape(["batch", "seq", HIDDEN])


# Graphs that can't be searched, or show no single stream


@refused("several-streams")
def every_layer_mixes_a_second_stream_in(model: ir.Model) -> None:
    second = value_of(model, sites_of(model)[0].skip)
    for site in sites_of(model):
        total = node_of(model, site.residual_add).outputs[0]
        put_behind(model, total, ir.node("Add", [total, second]))
        other = ir.node("Tanh", [second])
        model.graph.insert_after(second.producer(), other)  # type: ignore[arg-type]
        second = other.outputs[0]


def wrap_in_if(model: ir.Model, total: ir.Value, *, work: bool) -> None:
    """Puts an If behind a value; with ``work``, its bodies multiply by a matrix."""
    bodies = []
    for branch in ("then", "else"):
        other = model.graph.initializers["w1"]  # any value will do where nothing is run
        inner = ir.node("MatMul", [total, other]) if work else ir.node("Identity", [total])
        inner.outputs[0].name = f"{branch}_result"
        body = ir.Graph([], [inner.outputs[0]], nodes=[inner], name=branch)
        bodies.append(ir.AttrGraph(f"{branch}_branch", body))
    chosen = ir.Node("", "If", [constant(model, "flag", True)], bodies, name="the_if")
    chosen.outputs[0].name = "chosen"
    put_behind(model, total, chosen)


@refused("stream-in-body", field="the_if")
def a_body_works_on_the_stream(model: ir.Model) -> None:
    wrap_in_if(model, sum_of(model, 1).outputs[0], work=True)


@allowed()
def a_body_does_no_work(model: ir.Model) -> None:
    wrap_in_if(model, sum_of(model, 1).outputs[0], work=False)


def test_a_dead_body_goes_with_its_branch() -> None:
    model = tiny("pre_norm")
    wrap_in_if(model, branch_of(model, 1), work=False)
    pruned, _ = pruned_soundly(model, [Deletion(0, "mlp")])
    assert "If" not in operators(pruned)


@refused("several-models")
def two_models_stand_in_one_graph(model: ir.Model) -> None:
    other = tiny_model(TinySpec(form="post_norm", cache=False)).graph
    nodes, inputs, second = list(other), list(other.inputs), other.outputs[0]
    weights = list(other.initializers.values())
    for node in nodes:
        node.name = f"other_{node.name}"
    for part in (other.initializers, other.inputs, other.outputs):
        part.clear()
    other.remove(nodes)
    for value in (*inputs, *weights, *(v for node in nodes for v in node.outputs)):
        value.name = f"other_{value.name}"
    for weight in weights:
        model.graph.register_initializer(weight)
    model.graph.inputs.extend(inputs)
    model.graph.extend(nodes)
    both = ir.node("Mul", [model.graph.outputs[0], second])
    both.outputs[0].name = "both"
    model.graph.append(both)
    model.graph.outputs[0] = both.outputs[0]


@refused("local-function", field="'Layer'")
def a_local_function(model: ir.Model) -> None:
    value = ir.val("x")
    inner = ir.node("Identity", [value])
    graph = ir.Graph([value], inner.outputs, nodes=[inner], opset_imports={"": 18})
    function = ir.Function("local", "Layer", "", graph=graph, attributes=[])
    model.functions[function.identifier()] = function
    model.graph[10].domain, model.graph[10].op_type = "local", "Layer"


@refused("value-missing")
def a_cycle(model: ir.Model) -> None:
    sum_of(model, 0).replace_input_with(0, sum_of(model, 3).outputs[0])


@refused("value-missing", field="'nowhere'")
def a_value_that_nothing_gives(model: ir.Model) -> None:
    sum_of(model, 2).replace_input_with(0, ir.val("nowhere"))


@refused("no-ends")
def no_outputs(model: ir.Model) -> None:
    model.graph.outputs.clear()


@refused("repeated-name", field="same 2 nodes have the name 'same'")
def a_node_name_stands_twice(model: ir.Model) -> None:
    model.graph[3].name = model.graph[7].name = "same"


@allowed()
def nodes_without_names(model: ir.Model) -> None:
    for i, name in ((3, ""), (7, ""), (4, None), (8, None)):
        model.graph[i].name = name


@refused("no-attention")
def a_convolutional_network(model: ir.Model) -> None:
    image = declared("image", ir.DataType.FLOAT, "batch", 2, 5, 5)
    nodes, x = [], image
    for i in range(3):
        kernel = constant(model, f"k{i}", np.ones((2, 2, 3, 3), np.float32))
        kernel.shape = None  # so the window isn't known
        conv = ir.node("Conv", [x, kernel], {"pads": [1, 1, 1, 1]}, name=f"conv{i}")
        add = ir.node("Add", [x, conv.outputs[0]], name=f"add{i}")
        relu = ir.node("Relu", [add.outputs[0]], name=f"relu{i}")
        nodes += [conv, add, relu]
        x = relu.outputs[0]
    model.graph.outputs[:] = [x]
    model.graph.remove(list(model.graph)[::-1])
    model.graph.inputs[:] = [image]
    model.graph.extend(nodes)


# Operators that hide a sum


@pytest.mark.parametrize(
    ("op_type", "between"),
    [
        ("SkipLayerNormalization", 0),
        ("SkipGroupNorm", 2),
        ("BiasAdd", 1),
        ("GatedAdd", 0),
        ("MatMulNBitsMlp", 0),
        ("QLinearAdd", 2),
        ("FusedConv", 2),
        ("Gemm", 1),
    ],
)
def test_a_fused_residual_is_refused(op_type: str, between: int) -> None:
    model = tiny("pre_norm")
    add = sum_of(model, 3)
    operands = [add.inputs[0], *[model.graph.initializers["w1"]] * between, add.inputs[1]]
    fused = ir.node(op_type, operands, domain="com.microsoft", name="the_sum")
    model.graph.insert_before(add, fused)
    add.outputs[0].replace_all_uses_with(fused.outputs[0])
    model.graph.remove(add, safe=True)
    check_refused(model, "fused-residual", field=op_type)
    assert refusals(model)[0].node == "the_sum"


def test_a_skip_norm_whose_statistics_are_read_is_refused() -> None:
    model = fused_model(FUSED["genai_layer_norm"])
    norm = [node for node in model.graph if node.op_type.startswith("Skip")][2]
    publish(model, norm.outputs[1], "mean", "batch", "seq", 1)
    check_refused(model, "fused-residual", field=norm.name or "")


@allowed(runs=False)
def operators_that_could_fuse_a_residual_but_do_not(model: ir.Model) -> None:
    for node in list(model.graph):
        if node.op_type == "MatMul" and node.inputs[1].is_initializer():  # type: ignore[union-attr]
            node.op_type = "Gemm"


@allowed("post_norm_encoder")
def a_quantised_head(model: ir.Model) -> None:
    old = model.graph.outputs[0]
    head = old.producer()
    assert head is not None
    quantise = ir.Node("", "DynamicQuantizeLinear", [head.inputs[0]], num_outputs=3)
    for i, value in enumerate(quantise.outputs):
        value.name = f"quantised{i}"
    codes, scale, zero = quantise.outputs
    weight = constant(model, "head8", np.ones((HIDDEN, 11), np.uint8))
    product = ir.node("MatMulInteger", [codes, weight, zero])
    cast = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT.value})
    logits = ir.node("Mul", [cast.outputs[0], scale])
    logits.outputs[0].type, logits.outputs[0].shape = old.type, old.shape
    model.graph.extend([quantise, product, cast, logits])
    model.graph.outputs[0] = logits.outputs[0]
    model.graph.remove(head)
    logits.outputs[0].name = "logits"


@pytest.mark.parametrize(("spoil", "code", "places", "field", "form", "runs"), REFUSED)
def test_what_can_not_be_cut_is_refused_with_the_place_and_the_reason(
    spoil: Spoil, code: str, places: list[tuple[int, str]], field: str, form: str, runs: bool
) -> None:
    model = tiny(form)
    spoil(model)
    check_refused(model, code, places, field)
    for deletion in all_deletions(model) if runs else ():
        assert oracle_error(model, [deletion]) == 0.0


@pytest.mark.parametrize(("spoil", "form", "runs"), ALLOWED)
def test_what_only_looks_like_an_obstacle_is_none(spoil: Spoil, form: str, runs: bool) -> None:
    model = tiny(form)
    spoil(model)
    assert kinds(model) == usual()
    assert len(find_sites(model)) == 6
    for deletion in all_deletions(model) if runs else ():
        assert oracle_error(model, [deletion]) <= 1e-6


# Which inputs and outputs are a branch's own


class OwnMasks(_Builder):
    """Each layer has a float mask of its own among the inputs."""

    def build(self) -> ir.Model:
        self.masks = [
            self._input(f"mask_{layer}", "batch", 1, "seq", "total")
            for layer in range(self._spec.layers)
        ]
        return super().build()

    def _attention(self, x: ir.Value, layer: int) -> list[ir.Value]:
        shared, self._bias = self._bias, self._op("Add", self._bias, self.masks[layer])
        made = super()._attention(x, layer)
        self._bias = shared
        return made


@pytest.mark.parametrize("fused", [False, True])
def test_a_mask_of_a_layers_own_is_no_cache(fused: bool) -> None:
    model = OwnMasks(TinySpec(fused=fused, annotated=False), 0).build()
    caches = ("past_key_values.0.key", "past_key_values.0.value")
    assert sites_of(model)[0].kv_inputs == caches
    assert oracle_error(model, [Deletion(0, "attention")]) == 0.0


def test_a_cache_without_a_declared_shape_goes_too() -> None:
    model = tiny("past_from_last")
    for value in model.graph.inputs:
        if (value.name or "").startswith("past_key_values"):
            value.shape = None
    _, report = prune_graph(model, [Deletion(1, "attention")])
    assert report.deleted[0].inputs_removed == ("past_key_values.1.key", "past_key_values.1.value")


def test_first_step_caches_are_renumbered_as_those_of_the_later_steps() -> None:
    model = tiny("pre_norm")
    for cache in list(model.graph.inputs)[2:]:  # begin with nothing
        nothing = ir.tensor(np.zeros((2, HEADS, 0, HEAD_DIM), np.float32), name=cache.name)
        model.graph.inputs.remove(cache)
        cache.const_value, cache.shape = nothing, ir.Shape(nothing.shape)
        model.graph.register_initializer(cache)
    _, report = prune_graph(model, [Deletion(0, "attention")], renumber_kv=True)
    assert report.kv_renumbering["present.1.key"] == "present.0.key"
    assert report.kv_renumbering["present.2.value"] == "present.1.value"


class CrossAttention(_Builder):
    """Every layer looks at an encoder's states."""

    def build(self) -> ir.Model:
        self.states = self._input("encoder_hidden_states", "batch", "source", HIDDEN)
        return super().build()

    def keys(self, layer: int, part: str) -> ir.Value:
        return self._heads(self.states)

    def show(self, value: ir.Value, layer: int, part: str) -> ir.Value:
        name = f"present.{layer}.encoder.{part}"
        self._output(value, name, "batch", HEADS, "source", HEAD_DIM)
        return value

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        (attention,) = self._attention(self._norm(x), layer)
        x = self._op("Add", x, attention)
        query, key, value = self._heads(x), self.keys(layer, "key"), self.keys(layer, "value")
        scores = self._op("MatMul", query, self._op("Transpose", key, perm=[0, 1, 3, 2]))
        result = self._op("MatMul", self._op("Softmax", scores), value)
        flat = self._op("Transpose", result, perm=[0, 2, 1, 3])
        flat = self._op("Reshape", flat, self._constant(np.array([0, 0, HIDDEN])))
        x = self._op("Add", x, self._op("MatMul", flat, self._weight(HIDDEN, HIDDEN)))
        (mlp,) = self._mlp(self._norm(x), layer)
        return self._op("Add", x, mlp)


class Cached(CrossAttention):
    """Its keys and values come from a cache."""

    def keys(self, layer: int, part: str) -> ir.Value:
        name = f"past_key_values.{layer}.encoder.{part}"
        return self._input(name, "batch", HEADS, "source", HEAD_DIM)


class Published(CrossAttention):
    """Its keys and values go out."""

    def keys(self, layer: int, part: str) -> ir.Value:
        return self.show(super().keys(layer, part), layer, part)


class PassedOn(Cached):
    """The cache that comes in goes out again as it is."""

    def keys(self, layer: int, part: str) -> ir.Value:
        made = super().keys(layer, part)
        self.show(self._op("Identity", made), layer, part)
        return made


class SharedKeys(Published):
    """Both layers look at the keys and values that the first one publishes."""

    def keys(self, layer: int, part: str) -> ir.Value:
        self._made = getattr(self, "_made", {})
        if part not in self._made:
            self._made[part] = super().keys(layer, part)
        return self._made[part]


class DerivedKeys(CrossAttention):
    """The public keys are no projection of the layer's own, but half of one and more."""

    def keys(self, layer: int, part: str) -> ir.Value:
        made = super().keys(layer, part)
        self.show(self._op("Tanh", made), layer, part)
        return made


def caches(stem: str, layer: int) -> tuple[str, ...]:
    return tuple(f"{stem}.{layer}.encoder.{part}" for part in ("key", "value"))


@pytest.mark.parametrize(
    ("builder", "takes", "gives"),
    [
        (CrossAttention, False, False),
        (Cached, True, False),
        (Published, False, True),
        (PassedOn, True, True),
    ],
)
def test_cross_attention_goes_with_its_projections_or_its_caches(
    builder: type[CrossAttention], takes: bool, gives: bool
) -> None:
    model = builder(TinySpec(layers=2), 0).build()
    own = [(layer, kind) for layer in range(2) for kind in ("attention", "cross_attention", "mlp")]
    assert kinds(model) == own
    site = sites_of(model)[4]
    assert site.kv_inputs == (caches("past_key_values", 1) if takes else ())
    assert site.kv_outputs == (caches("present", 1) if gives else ())
    assert site.parameters == (2 if takes else 4) * HIDDEN * HIDDEN
    for deletion in all_deletions(model):
        assert oracle_error(model, [deletion]) == 0.0


def test_published_keys_stay_while_another_layer_looks_at_them() -> None:
    model = SharedKeys(TinySpec(layers=2), 0).build()
    assert [site.kv_outputs for site in sites_of(model) if site.kind == "cross_attention"] == [
        (), ()
    ]  # fmt: skip
    assert oracle_error(model, [Deletion(0, "cross_attention")]) == 0.0


def test_an_output_that_is_made_of_the_keys_keeps_cross_attention_in_place() -> None:
    model = DerivedKeys(TinySpec(layers=2), 0).build()
    check_refused(model, "public-keys", [(n, "cross_attention") for n in range(2)])


def test_states_go_with_their_mixer() -> None:
    def names(layer: int, stem: str) -> tuple[str, ...]:
        return (f"{stem}_conv.{layer}", f"{stem}_recurrent.{layer}")

    model = StatefulMixers(TinySpec(cache=False, annotated=False), 0).build()
    mixers = [site for site in sites_of(model) if site.kind == "mixer"]
    assert [site.kv_inputs for site in mixers] == [names(n, "past") for n in range(3)]
    assert [site.kv_outputs for site in mixers] == [names(n, "present") for n in range(3)]
    deletions = [Deletion(1, "mixer"), Deletion(2, "mlp")]
    pruned, report = prune_graph(model, deletions, renumber_kv=True)
    renamed = report.kv_renumbering
    assert renamed == {
        before: after
        for stem in ("past", "present")
        for before, after in zip(names(2, stem), names(1, stem), strict=True)
    }
    feed = {
        name: array * np.float32(0.1) if name.startswith("past") else array
        for name, array in tiny_feed(model, seq=1).items()
    }
    expected = run(masked_model(model, deletions), feed)
    kept = {renamed.get(k, k): v for k, v in feed.items() if k not in names(1, "past")}
    back = {after: before for before, after in renamed.items()}
    have = {back.get(name, name): value for name, value in run(pruned, kept).items()}
    assert largest_difference(expected, have, names(1, "present")) < 1e-4
