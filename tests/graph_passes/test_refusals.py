"""What can't be cut safely is refused, with the place and the reason; never a wrong model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from graph_support import check_clean, oracle_error, sites_of, tiny

from graph_passes import Deletion, Refusal, SurgeryError, find_sites, prune_graph
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_model


def node_of(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def value_of(model: ir.Model, name: str) -> ir.Value:
    return next(value for node in model.graph for value in node.outputs if value.name == name)


def refusals(model: ir.Model) -> list[Refusal]:
    return [item for item in find_sites(model) if isinstance(item, Refusal)]


def test_too_few_sites_is_an_error_that_lists_what_was_found() -> None:
    with raises(SurgeryError, "sublayer-missing", "mlp 3", "attention 7") as caught:
        prune_graph(tiny("pre_norm"), [Deletion(3, "mlp"), Deletion(7, "attention")])
    assert "attention 0-2; mlp 0-2" in str(caught.value)


def test_an_absent_block_is_an_error() -> None:
    with raises(SurgeryError, "sublayer-missing", "block 3"):
        prune_graph(tiny("pre_norm"), [Deletion(3, "block")])


def test_an_empty_plan_is_an_error() -> None:
    with raises(SurgeryError, "nothing-to-delete"):
        prune_graph(tiny("pre_norm"), [])


def test_all_attentions_may_go_but_not_everything() -> None:
    prune_graph(tiny("pre_norm"), [Deletion(layer, "attention") for layer in range(3)])
    everything = [Deletion(layer, "block") for layer in range(3)]
    with raises(SurgeryError, "nothing-left") as caught:
        prune_graph(tiny("pre_norm"), everything)
    assert "--allow-empty" in str(caught.value.hint)


def test_no_other_refusal_is_lifted_with_it() -> None:
    everything = [Deletion(layer, "block") for layer in range(3)]
    with raises(SurgeryError, "sublayer-missing", "block 3"):
        prune_graph(tiny("pre_norm"), [*everything, Deletion(3, "block")], allow_all=True)
    with raises(SurgeryError, "nothing-to-delete"):
        prune_graph(tiny("pre_norm"), [], allow_all=True)
    with raises(SurgeryError, "numbers-missing", "bias"):
        prune_graph(tiny("pre_norm"), [*everything[1:], Deletion(0, "mlp", "bias")], allow_all=True)


def test_a_replacement_without_numbers_is_an_error() -> None:
    with raises(SurgeryError, "numbers-missing", "bias"):
        prune_graph(tiny("pre_norm"), [Deletion(1, "mlp", "bias")])


def test_a_branch_that_is_read_elsewhere_is_refused_with_the_readers_name() -> None:
    model = tiny("pre_norm")
    first, later = sites_of(model)[0], sites_of(model)[5]
    branch = value_of(model, first.branches[0])
    last = node_of(model, later.residual_add)
    reader = ir.node("Mul", [last.inputs[1], branch], name="the_reader")
    model.graph.insert_before(last, reader)
    last.replace_input_with(1, reader.outputs[0])
    (refusal,) = refusals(model)
    assert (refusal.layer, refusal.kind, refusal.node) == (0, "attention", "the_reader")
    assert refusal.code == "read-elsewhere"
    with raises(SurgeryError, "read-elsewhere", "the_reader"):
        prune_graph(model, [Deletion(0, "attention")])
    assert oracle_error(model, [Deletion(1, "attention"), Deletion(0, "mlp")]) == 0.0


def test_keys_that_another_layer_uses_are_not_cut() -> None:
    model = tiny("pre_norm")
    keys = [value for value in model.graph.outputs if (value.name or "").endswith("key")]
    for user, slot in list(keys[2].uses()):
        user.replace_input_with(slot, keys[0])
    assert [(r.layer, r.kind) for r in refusals(model)] == [(0, "attention")]


def test_a_skip_that_only_broadcasts_is_refused() -> None:
    model = tiny("post_norm_encoder")
    site = sites_of(model)[2]
    add = node_of(model, site.residual_add)
    mean = ir.node("ReduceMean", [value_of(model, site.skip), ir.val("axis")], name="mean")
    axis = ir.Value(
        name="axis", const_value=ir.tensor(np.array([1])), type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([1]),
    )  # fmt: skip
    mean.replace_input_with(1, axis)
    model.graph.register_initializer(axis)
    mean.outputs[0].shape = ir.Shape(["batch", 1, 8])
    mean.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    skip = value_of(model, site.skip)
    model.graph.insert_after(skip.producer(), mean)  # type: ignore[arg-type]
    for user, slot in list(skip.uses()):
        if user is not mean:
            user.replace_input_with(slot, mean.outputs[0])
    branch = value_of(model, site.branches[0])
    branch.shape = ir.Shape(["batch", "seq", 8])
    add.outputs[0].shape = ir.Shape(["batch", "seq", 8])
    (refusal,) = refusals(model)
    assert (refusal.layer, refusal.kind, refusal.node) == (1, "attention", site.residual_add)
    assert refusal.code == "broadcast-skip"
    with raises(SurgeryError, "broadcast-skip", site.residual_add):
        prune_graph(model, [Deletion(1, "attention")])


def test_a_cache_output_shared_by_layers_is_refused() -> None:
    model = tiny("pre_norm")
    caches = list(model.graph.outputs[1:])
    stacked = ir.node("Concat", caches, {"axis": 0}, name="stack")
    stacked.outputs[0].name = "presents"
    stacked.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(stacked)
    del model.graph.outputs[1:]
    model.graph.outputs.append(stacked.outputs[0])
    result = refusals(model)
    assert [(r.layer, r.kind) for r in result] == [(n, "attention") for n in range(3)]
    assert all(r.code == "shared-output" and "'presents'" in r.reason for r in result)


def test_a_past_length_that_no_survivor_has_is_an_error() -> None:
    model = tiny("pre_norm")
    for value in model.graph.inputs:
        if (value.name or "").startswith(("past_key_values.1", "past_key_values.2")):
            value.shape = ir.Shape(["batch", 2, "window", 4])
    with raises(SurgeryError, "cache-still-read", "past_key_values.0.key"):
        prune_graph(model, [Deletion(0, "attention")])
    prune_graph(model, [Deletion(1, "attention")])


def test_a_convolutional_network_is_no_transformer() -> None:
    (refusal,) = find_sites(_residual_convolutions())
    assert isinstance(refusal, Refusal)
    assert refusal.code == "no-attention"
    with raises(SurgeryError, "sublayer-missing", "mlp 0", refusal.node):
        prune_graph(_residual_convolutions(), [Deletion(0, "mlp")])


def _residual_convolutions() -> ir.Model:
    image = ir.Value(
        name="image", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 2, 5, 5])
    )
    nodes, weights, x = [], [], image
    for i in range(3):
        tensor = ir.tensor(np.ones((2, 2, 3, 3), np.float32), name=f"k{i}")
        kernel = ir.Value(name=f"k{i}", const_value=tensor, type=ir.TensorType(tensor.dtype))
        weights.append(kernel)
        conv = ir.node("Conv", [x, kernel], {"pads": [1, 1, 1, 1]})
        add = ir.node("Add", [x, conv.outputs[0]])
        relu = ir.node("Relu", [add.outputs[0]])
        nodes += [conv, add, relu]
        x = relu.outputs[0]
    graph = ir.Graph(
        [image], [x], nodes=nodes, initializers=weights, opset_imports={"": 18}, name="cnn"
    )
    return ir.Model(graph, ir_version=10)


def test_several_streams_are_refused() -> None:
    model = tiny("pre_norm")
    # Every layer mixes a second stream in, so no value carries everything.
    second = value_of(model, sites_of(model)[0].skip)
    for site in sites_of(model):
        add = node_of(model, site.residual_add)
        mixed = ir.node("Add", [add.outputs[0], second])
        total = add.outputs[0]
        model.graph.insert_after(add, mixed)
        total.replace_all_uses_with(mixed.outputs[0])
        mixed.replace_input_with(0, total)
        other = ir.node("Tanh", [second])
        model.graph.insert_after(second.producer(), other)  # type: ignore[arg-type]
        second = other.outputs[0]
    sites = find_sites(model)
    assert all(isinstance(item, Refusal) for item in sites)


def _wrap_in_if(model: ir.Model, name: str, *, work: bool = False) -> None:
    """Puts an If behind one node; with ``work``, its bodies multiply by a matrix."""
    node = node_of(model, name)
    total = node.outputs[0]
    branches = []
    for branch in ("then", "else"):
        other = model.graph.initializers["w1"]  # any value will do where nothing is run
        inner = ir.node("MatMul", [total, other]) if work else ir.node("Identity", [total])
        inner.outputs[0].name = f"{branch}_result"
        branches.append(ir.Graph([], [inner.outputs[0]], nodes=[inner], name=branch))
    flag = ir.Value(
        name="flag", const_value=ir.tensor(np.array(True)), type=ir.TensorType(ir.DataType.BOOL),
        shape=ir.Shape([]),
    )  # fmt: skip
    model.graph.register_initializer(flag)
    chosen = ir.Node(
        "", "If", [flag],
        [ir.AttrGraph("then_branch", branches[0]), ir.AttrGraph("else_branch", branches[1])],
        name="the_if",
    )  # fmt: skip
    chosen.outputs[0].name = "chosen"
    model.graph.insert_after(node, chosen)
    for user, slot in list(total.uses()):
        if user.graph is model.graph:
            user.replace_input_with(slot, chosen.outputs[0])


def test_a_body_without_work_on_the_stream_hides_nothing() -> None:
    model = tiny("pre_norm")
    _wrap_in_if(model, sites_of(model)[1].residual_add)
    assert len(sites_of(model)) == len(find_sites(model)) == 6
    for plan in ([Deletion(0, "mlp")], [Deletion(1, "attention"), Deletion(0, "attention")]):
        assert oracle_error(model, plan) == 0.0


def test_a_body_with_work_on_the_stream_is_refused() -> None:
    model = tiny("pre_norm")
    _wrap_in_if(model, sites_of(model)[1].residual_add, work=True)
    (refusal,) = find_sites(model)
    assert isinstance(refusal, Refusal)
    assert refusal.node == "the_if"
    assert refusal.code == "stream-in-body"
    with raises(SurgeryError, "sublayer-missing", "mlp 0", "the_if"):
        prune_graph(model, [Deletion(0, "mlp")])


def test_two_models_in_one_graph_are_refused() -> None:
    model, other = tiny("pre_norm"), tiny_model(TinySpec(form="post_norm", cache=False))
    for node in other.graph:
        node.name = f"other_{node.name}"
    for value in (*other.graph.inputs, *(v for node in other.graph for v in node.outputs)):
        value.name = f"other_{value.name}"
    weights = list(other.graph.initializers.values())
    other.graph.initializers.clear()
    nodes, inputs, second = list(other.graph), list(other.graph.inputs), other.graph.outputs[0]
    other.graph.outputs.clear()
    other.graph.inputs.clear()
    other.graph.remove(nodes)
    for weight in weights:
        weight.name = f"other_{weight.name}"
        model.graph.register_initializer(weight)
    model.graph.inputs.extend(inputs)
    model.graph.extend(nodes)
    both = ir.node("Mul", [model.graph.outputs[0], second])
    both.outputs[0].name = "both"
    model.graph.append(both)
    model.graph.outputs[0] = both.outputs[0]
    (refusal,) = find_sites(model)
    assert isinstance(refusal, Refusal)
    assert refusal.code == "several-models"


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
def test_a_fused_residual_is_refused_with_what_to_do(op_type: str, between: int) -> None:
    model = tiny("pre_norm")
    site = sites_of(model)[3]
    add = node_of(model, site.residual_add)
    weight = model.graph.initializers["w1"]
    operands = [add.inputs[0], *[weight] * between, add.inputs[1]]
    fused = ir.node(op_type, operands, domain="com.microsoft", name="the_sum")
    model.graph.insert_before(add, fused)
    add.outputs[0].replace_all_uses_with(fused.outputs[0])
    model.graph.remove(add, safe=True)
    (refusal,) = find_sites(model)
    assert isinstance(refusal, Refusal)
    assert refusal.node == "the_sum"
    assert op_type in refusal.reason
    assert refusal.code == "fused-residual"
    with raises(SurgeryError, "sublayer-missing", "mlp 0", "the_sum"):
        prune_graph(model, [Deletion(0, "mlp")])


def test_operators_that_could_fuse_a_residual_but_do_not_are_no_obstacle() -> None:
    model = tiny("pre_norm")
    for node in list(model.graph):
        if node.op_type == "MatMul" and node.inputs[1].is_initializer():  # type: ignore[union-attr]
            node.op_type = "Gemm"
    assert len(sites_of(model)) == 6


def _local_function(model: ir.Model) -> None:
    value = ir.val("x")
    inner = ir.node("Identity", [value])
    graph = ir.Graph([value], inner.outputs, nodes=[inner], opset_imports={"": 18})
    function = ir.Function("local", "Layer", "", graph=graph, attributes=[])
    model.functions[function.identifier()] = function
    model.graph[10].domain, model.graph[10].op_type = "local", "Layer"


def _cycle(model: ir.Model) -> None:
    sites = sites_of(model)
    first = node_of(model, sites[0].residual_add)
    first.replace_input_with(0, node_of(model, sites[3].residual_add).outputs[0])


def _dangling(model: ir.Model) -> None:
    node_of(model, sites_of(model)[2].residual_add).replace_input_with(0, ir.val("nowhere"))


def _no_outputs(model: ir.Model) -> None:
    model.graph.outputs.clear()


@pytest.mark.parametrize(
    ("spoil", "code", "field"),
    [
        (_local_function, "local-function", "'Layer'"),
        (_cycle, "value-missing", ""),
        (_dangling, "value-missing", "'nowhere'"),
        (_no_outputs, "no-ends", ""),
    ],
)
def test_a_graph_that_cannot_be_searched_is_refused(
    spoil: Callable[[ir.Model], None], code: str, field: str
) -> None:
    model = tiny("pre_norm")
    spoil(model)
    (refusal,) = find_sites(model)
    assert isinstance(refusal, Refusal)
    assert refusal.code == code
    with raises(SurgeryError, code, field, refusal.node):
        prune_graph(model, [Deletion(1, "mlp")])


def test_a_dead_body_goes_with_its_branch() -> None:
    model = tiny("pre_norm")
    _wrap_in_if(model, value_of(model, sites_of(model)[1].branches[0]).producer().name or "")  # type: ignore[union-attr]
    pruned, _ = prune_graph(model, [Deletion(0, "mlp")])
    assert "If" not in {node.op_type for node in pruned.graph}
    check_clean(pruned)


def test_parallel_branches_whose_sum_is_public_are_not_taken_for_one() -> None:
    model = tiny_model(TinySpec(form="parallel"))
    attention, mlp = sites_of(model)[:2]
    (inner,) = (
        node.outputs[0]
        for node in model.graph
        if {value.name for value in node.inputs if value} == {*attention.branches, *mlp.branches}
    )
    model.graph.outputs.append(inner)
    (result,) = (refusal for refusal in refusals(model) if refusal.layer == 0)
    assert (result.code, result.node) == ("sum-of-branches", inner.producer().name)  # type: ignore[union-attr]
    assert repr(inner.name) in result.reason
    assert [site.layer for site in sites_of(model)] == [1, 1, 2, 2]
    with raises(SurgeryError, "sum-of-branches"):
        prune_graph(model, [Deletion(0, "attention")])
    assert oracle_error(model, [Deletion(1, "attention")]) == 0.0


def test_a_node_name_that_stands_twice_is_refused() -> None:
    model = tiny("pre_norm")
    model.graph[3].name = model.graph[7].name = "same"
    (refusal,) = find_sites(model)
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.node) == ("repeated-name", "same")
    with raises(SurgeryError, "repeated-name", 2, "'same'"):
        prune_graph(model, [Deletion(1, "mlp")])


@pytest.mark.parametrize("name", ["", None])
def test_nodes_without_names_are_no_obstacle(name: str | None) -> None:
    model = tiny("pre_norm")
    for node in (model.graph[3], model.graph[7]):
        node.name = name
    assert len(sites_of(model)) == 6
