"""A bias or a linear map in a deleted branch's place equals the masked original plus the same."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fused_graphs import FUSED, FusedSpec, fused_model
from graph_support import (
    SPECS,
    all_deletions,
    check_clean,
    check_tidy,
    feeds,
    largest_difference,
    run,
    session,
    sites_of,
    text,
    tiny,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replacement_support import Given, numbers, plan, replaced_error
from test_caches import _Cached, _CrossAttention
from test_runtime_graphs import CASES as QUANTISED
from test_runtime_graphs import MAKERS

from graph_passes import Deletion, ReplacementTensors, SublayerRef, SurgeryError, prune_graph
from graph_passes.testing import masked_model
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_feed, tiny_model

# Sums are taken in another order, and a bias is rounded once more; relative to the largest output.
TOLERANCE = 2e-6
FORMS = {**SPECS, "norm_after": TinySpec(form="norm_after")}
LINEAR, BIAS = plan(("attention", 1, "linear")), plan(("attention", 1, "bias"))


def form(name: str, layers: int = 3) -> ir.Model:
    if name in FUSED:
        return fused_model(replace(FUSED[name], layers=layers))
    return tiny_model(replace(FORMS[name], layers=layers))


def random_plan(model: ir.Model, seed: int) -> list[Deletion]:
    """Any number of sublayers but all, each with any replacement."""
    choice = random.Random(seed)
    everything = all_deletions(model)
    subset = choice.sample(everything, choice.randint(2, len(everything) - 1))
    return [replace(d, replacement=choice.choice(["none", "bias", "linear"])) for d in subset]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def check_counts(model: ir.Model, deletions: list[Deletion], given: Given) -> None:
    """The result is tidy, and the report's parameters add up."""
    before = text(model)
    pruned, report = prune_graph(model, deletions, replacements=given)
    (check_tidy if model.graph.name == "fused" else check_clean)(pruned)
    removed = sum(entry.parameters_removed for entry in report.deleted)
    added = sum(entry.parameters_added for entry in report.deleted)
    assert report.before.parameters - removed + added == report.after.parameters
    assert text(model) == before


@pytest.mark.parametrize("name", [*FORMS, *FUSED])
def test_random_sets_equal_the_masked_original(name: str) -> None:
    model = form(name)
    for seed in range(3):
        deletions = random_plan(model, seed)
        given = numbers(model, deletions, seed=seed)
        assert replaced_error(model, deletions, given, optimise=seed == 0) <= TOLERANCE
        check_counts(model, deletions, given)


@pytest.mark.parametrize("name", [*FORMS, *FUSED])
def test_everything_is_replaced_where_it_is_allowed(name: str) -> None:
    model = form(name)
    deletions = [replace(d, replacement="linear") for d in all_deletions(model)]
    given = numbers(model, deletions)
    assert replaced_error(model, deletions, given, allow_all=True) <= TOLERANCE


_forms = st.sampled_from(["pre_norm", "post_norm", "norm_after", "parallel_in_turn", "split_mlp"])
_specs = st.builds(TinySpec, form=_forms, layers=st.integers(1, 4), annotated=st.booleans())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spec=_specs, data=st.data())
def test_any_model_any_replacements(spec: TinySpec, data: st.DataObject) -> None:
    model = tiny_model(spec, seed=1)
    kinds = st.sampled_from(["keep", "none", "bias", "linear"])
    chosen = [(d, data.draw(kinds)) for d in all_deletions(model)[1:]]
    deletions = [replace(d, replacement=kind) for d, kind in chosen if kind != "keep"]
    if deletions:
        given = numbers(model, deletions)
        assert replaced_error(model, deletions, given) <= TOLERANCE
        check_counts(model, deletions, given)


@pytest.mark.parametrize(("maker", "name"), QUANTISED)
def test_quantised_and_optimised_graphs(maker: str, name: str, tmp_path: Path) -> None:
    model = MAKERS[maker](form(name, layers=2), tmp_path)
    deletions = plan(("attention", 0, "linear"), ("mlp", 0, "bias"), ("attention", 1, "bias"))
    given = numbers(model, deletions)
    assert replaced_error(model, deletions, given) <= TOLERANCE
    wrong = {**given, SublayerRef(0, "attention"): numbers(model, deletions, seed=9)[given_ref()]}
    assert replaced_error(model, deletions, given, other=wrong) > 1e-2
    check_tidy(prune_graph(model, deletions, replacements=given)[0])


def given_ref() -> SublayerRef:
    return SublayerRef(0, "attention")


def in_half(model: ir.Model) -> ir.Model:
    """The same in float16."""
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(ir.DataType.FLOAT16)
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
            half = value.const_value.numpy().clip(-6e4, 6e4).astype(np.float16)
            value.const_value = ir.tensor(half, name=value.name)
    for node in model.graph:
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16.value)
    return model


def test_in_float16_numbers_are_rounded_to_it() -> None:
    model = in_half(tiny("unannotated"))
    deletions = plan(("attention", 1, "linear"), ("mlp", 1, "bias"))
    given = numbers(model, deletions)
    inputs = [
        {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in feed.items()}
        for feed in feeds(model)
    ]
    # Half a dozen roundings of 1e-3 each, in another order.
    assert replaced_error(model, deletions, given, inputs=inputs) < 5e-3
    wrong = numbers(model, deletions, seed=1)
    assert replaced_error(model, deletions, given, inputs=inputs, other=wrong) > 5e-2
    pruned, _ = prune_graph(model, deletions, replacements=given)
    weight = pruned.graph.initializers["depthcut.attention.1.weight"].const_value
    assert weight is not None
    assert weight.dtype == ir.DataType.FLOAT16
    too_large = ReplacementTensors(np.full(8, 1e5, np.float32))
    with raises(SurgeryError, "too-large", "FLOAT16"):
        prune_graph(model, BIAS, replacements={SublayerRef(1, "attention"): too_large})


def test_an_input_of_another_type_is_cast() -> None:
    model = tiny("pre_norm")
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    up = ir.node("Cast", [norm.outputs[0]], {"to": ir.DataType.DOUBLE}, name="up")
    down = ir.node("Cast", [up.outputs[0]], {"to": ir.DataType.FLOAT}, name="down")
    for i, made in enumerate((up, down)):
        made.outputs[0].name = f"form{i}"
    norm.outputs[0].replace_all_uses_with(down.outputs[0])
    up.replace_input_with(0, norm.outputs[0])
    model.graph.insert_after(norm, [up, down])
    deletions = plan(("attention", 0, "linear"))
    assert sites_of(model)[0].branch_input == "form1"
    assert replaced_error(model, deletions, numbers(model, deletions)) <= TOLERANCE


def test_in_an_old_graph_new_weights_are_inputs_as_all_are() -> None:
    model = tiny("pre_norm")
    model.ir_version = 3
    model.graph.inputs.extend(model.graph.initializers.values())
    deletions = plan(("attention", 1, "linear"), ("mlp", 2, "bias"))
    pruned, _ = prune_graph(model, deletions, replacements=numbers(model, deletions))
    onnx.checker.check_model(ir.to_proto(pruned), full_check=True)
    assert replaced_error(model, deletions, numbers(model, deletions)) <= TOLERANCE
    again = prune_graph(pruned, plan(("mlp", 0, "none")))[1]
    assert [(entry.kind, entry.layer) for entry in again.deleted] == [("mlp", 0)]


def test_a_shape_is_not_declared_without_its_type() -> None:
    """A linear map keeps the norm before it, of which something may ask for the shape."""
    model = tiny("unannotated")
    norm = next(v for v in model.graph.all_nodes() if v.op_type == "LayerNormalization").outputs[0]
    shape = ir.node("Shape", [norm], name="shape")
    shape.outputs[0].name, shape.outputs[0].type = "shape", ir.TensorType(ir.DataType.INT64)
    model.graph.append(shape)
    model.graph.outputs.append(shape.outputs[0])
    deletions = plan(("attention", 0, "linear"))
    pruned, _ = prune_graph(model, deletions, replacements=numbers(model, deletions))
    values = {value.name: value for node in pruned.graph for value in node.outputs}
    assert values[norm.name].shape is not None
    assert [v.name for v in values.values() if v.shape is not None and v.type is None] == []


@pytest.mark.parametrize("name", ["pre_norm", "norm_after", "parallel", "genai", "bert"])
@pytest.mark.parametrize("part", ["bias", "weight", "turned"])
def test_the_oracle_catches_other_numbers(name: str, part: str) -> None:
    model, right = form(name), numbers(form(name), LINEAR)
    (ref,) = right
    bias, weight = np.array(right[ref].bias), np.array(right[ref].weight)
    if part == "bias":
        bias[3] += 0.1
    elif part == "weight":
        weight[1, 2] += 0.5
    else:
        weight = weight.T
    wrong = {ref: ReplacementTensors(bias, weight)}
    assert replaced_error(model, LINEAR, right, other=wrong) > 1e-4


@pytest.mark.parametrize("name", ["pre_norm", "sandwich", "parallel"])
def test_a_linear_map_stands_behind_the_norm_and_the_cache_goes(name: str) -> None:
    model = form(name)
    pruned, report = prune_graph(model, LINEAR, replacements=numbers(model, LINEAR))
    (product,) = (node for node in pruned.graph if node.name == "depthcut.attention.1.matmul")
    norm = product.inputs[0].producer()  # type: ignore[union-attr]
    assert norm is not None
    assert norm.op_type == "LayerNormalization"
    assert operators(pruned)["Transpose"] == operators(model)["Transpose"] - 5
    assert report.deleted[0].replacement == "linear"
    assert report.deleted[0].parameters_added == 8 * 8 + 8
    assert report.deleted[0].inputs_removed == ("past_key_values.1.key", "past_key_values.1.value")
    assert all(".1." not in (v.name or "") for v in (*pruned.graph.inputs, *pruned.graph.outputs))


def test_one_constant_add_takes_the_place_of_a_branch() -> None:
    model = form("pre_norm")
    bare, _ = prune_graph(model, plan(("attention", 1, "none")))
    pruned, _ = prune_graph(model, BIAS, replacements=numbers(model, BIAS))
    assert operators(pruned) - operators(bare) == {"Add": 1}


def test_the_biases_of_neighbours_become_one() -> None:
    model = form("pre_norm")
    deletions = plan(("attention", 1, "bias"), ("mlp", 1, "bias"), ("attention", 2, "bias"))
    bare, _ = prune_graph(model, [replace(d, replacement="none") for d in deletions])
    pruned, report = prune_graph(model, deletions, replacements=numbers(model, deletions))
    assert operators(pruned) - operators(bare) == {"Add": 1}
    assert sum(entry.parameters_added for entry in report.deleted) == 8


@pytest.mark.parametrize("name", FUSED)
def test_fused_norms_stay_fused(name: str) -> None:
    model = form(name)
    before, bare = operators(model), operators(prune_graph(model, [Deletion(1, "attention")])[0])
    for deletions in (LINEAR, BIAS):
        pruned, _ = prune_graph(model, deletions, replacements=numbers(model, deletions))
        after = operators(pruned)
        skips = [op for op in after if op.startswith("Skip")]
        if deletions is LINEAR:
            assert [after[op] for op in skips] == [before[op] for op in skips]
            # Of parallel branches the sum is an Add of its own, so the map's bias is one too.
            assert after["Add"] == before["Add"] + FUSED[name].parallel
        else:
            assert after == bare


def add_bias(model: ir.Model, branch: str) -> ir.Value:
    """Puts a constant Add behind a branch; gives the constant."""
    (value,) = (v for node in model.graph for v in node.outputs if v.name == branch)
    bias = ir.Value(name="own_bias", type=value.type, shape=ir.Shape([8]))
    bias.const_value = ir.tensor(np.linspace(0, 1, 8, dtype=np.float32), name="own_bias")
    model.graph.register_initializer(bias)
    add = ir.node("Add", [value, bias], name="own_add")
    add.outputs[0].name, add.outputs[0].type = "own_sum", value.type
    value.replace_all_uses_with(add.outputs[0])
    add.replace_input_with(0, value)
    model.graph.insert_after(value.producer(), add)  # type: ignore[arg-type]
    return bias


@pytest.mark.parametrize("name", ["pre_norm", "parallel", "parallel_in_turn"])
def test_a_bias_goes_to_the_one_before_it_and_ties_the_two(name: str) -> None:
    model = form(name)
    home = SublayerRef(0 if name == "pre_norm" else 1, "mlp")
    (branch,) = (site.branches[0] for site in sites_of(model) if site.ref == home)
    add_bias(model, branch)
    given = numbers(model, BIAS)
    assert replaced_error(model, BIAS, given) <= TOLERANCE
    check_counts(model, BIAS, given)
    pruned, report = prune_graph(model, BIAS, replacements=given)
    bare, _ = prune_graph(model, plan(("attention", 1, "none")))
    assert operators(pruned) == operators(bare)
    assert report.deleted[0].parameters_added == 0
    details = json.loads(pruned.metadata_props["depthcut.replacements"])
    assert details["attention 1"]["folded_into"] == [str(home)]
    with raises(SurgeryError, "bias-folded", home, "attention 1"):
        prune_graph(pruned, [Deletion(home.layer, home.kind)])
    assert prune_graph(pruned, [Deletion(2, "mlp")])


def test_a_bias_whose_sum_is_read_or_shared_stays_alone() -> None:
    model = form("pre_norm")
    (branch,) = (s.branches[0] for s in sites_of(model) if s.ref == SublayerRef(0, "mlp"))
    add_bias(model, branch)
    deletions = plan(("mlp", 1, "bias"))  # what is before it is read by the norm of attention 1
    pruned, report = prune_graph(model, deletions, replacements=numbers(model, deletions))
    assert report.deleted[0].parameters_added == 8
    assert json.loads(pruned.metadata_props["depthcut.replacements"])["mlp 1"]["folded_into"] == []


@pytest.mark.parametrize("name", ["pre_norm", "norm_after", "parallel", "genai", "genai_bias"])
def test_in_two_steps_it_is_the_same(name: str) -> None:
    model = form(name)
    first, second = plan(("attention", 1, "linear")), plan(("mlp", 2, "linear"))
    given = numbers(model, [*first, *second])
    halves = [{ref: g} for ref, g in given.items()]
    once, _ = prune_graph(model, [*first, *second], replacements=given)
    twice, _ = prune_graph(model, first, replacements=halves[0])
    left = [(s.layer, s.kind) for s in sites_of(model) if s.ref != SublayerRef(1, "attention")]
    assert [(s.layer, s.kind) for s in sites_of(twice)] == left
    twice, _ = prune_graph(twice, second, replacements=halves[1])
    assert twice.metadata_props == once.metadata_props
    for feed in feeds(once):
        one, other = (run(session(m, optimise=False), feed) for m in (once, twice))
        assert largest_difference(one, other) <= TOLERANCE
    same, report = prune_graph(once, [*first, *second], replacements=given)
    assert report.deleted == ()
    assert text(same) == text(once)


@pytest.mark.parametrize("asked", ["none", "bias"])
def test_another_replacement_than_the_recorded_one_is_an_error(asked: Any) -> None:
    model = form("pre_norm")
    pruned, _ = prune_graph(model, LINEAR, replacements=numbers(model, LINEAR))
    deletions = [Deletion(1, "attention", asked), Deletion(2, "mlp")]
    with raises(SurgeryError, "other-replacement", "attention 1", "'linear'"):
        prune_graph(pruned, deletions, replacements=numbers(model, deletions))


def test_other_numbers_than_the_recorded_ones_are_an_error() -> None:
    model = form("pre_norm")
    pruned, _ = prune_graph(model, LINEAR, replacements=numbers(model, LINEAR))
    with raises(SurgeryError, "other-numbers"):
        prune_graph(pruned, LINEAR, replacements=numbers(model, LINEAR, seed=1))


def test_other_maps_without_a_bias_are_told_apart_by_their_weights() -> None:
    model = form("pre_norm")
    one, other = (
        {
            ref: ReplacementTensors(np.zeros_like(given.bias), given.weight)
            for ref, given in numbers(model, LINEAR, seed=seed).items()
        }
        for seed in (0, 1)
    )
    pruned, _ = prune_graph(model, LINEAR, replacements=one)
    same, report = prune_graph(pruned, LINEAR, replacements=one)
    assert report.deleted == ()
    with raises(SurgeryError, "other-numbers"):
        prune_graph(same, LINEAR, replacements=other)


def test_a_graph_whose_linear_map_is_lost_is_refused() -> None:
    model = form("pre_norm")
    pruned, _ = prune_graph(model, LINEAR, replacements=numbers(model, LINEAR))
    record = pruned.metadata_props["depthcut.plan"]
    model.metadata_props["depthcut.plan"] = record
    assert sites_of(pruned)
    assert sites_of(model) == []


def test_a_block_takes_a_replacement_for_each_of_its_sublayers() -> None:
    model = form("pre_norm")
    deletions = plan(("block", 1, "linear"))
    given = numbers(model, deletions)
    assert len(given) == 2
    assert replaced_error(model, deletions, given) <= TOLERANCE
    del given[SublayerRef(1, "mlp")]
    with raises(SurgeryError, "numbers-missing", "mlp 1"):
        prune_graph(model, deletions, replacements=given)


@pytest.mark.parametrize("builder", [_CrossAttention, _Cached])
def test_cross_attention_is_replaced_too(builder: type[_CrossAttention]) -> None:
    model = builder(TinySpec(layers=2), 0).build()
    rng = np.random.default_rng(0)
    feed = tiny_feed(model, seq=3, past=2)
    for name in feed:
        if "encoder" in name:
            shape = (2, 5, 8) if "states" in name else (2, 2, 5, 4)
            feed[name] = rng.standard_normal(shape).astype(np.float32)
    deletions = plan(("attention", 0, "bias"), ("cross_attention", 0, "linear"), ("mlp", 1, "bias"))
    given = numbers(model, deletions)
    assert replaced_error(model, deletions, given, inputs=[feed]) <= TOLERANCE
    wrong = numbers(model, deletions, seed=1)
    assert replaced_error(model, deletions, given, inputs=[feed], other=wrong) > 1e-2
    pruned, _ = prune_graph(model, deletions, replacements=given)
    assert not any(".0.encoder" in (value.name or "") for value in pruned.graph.inputs)


def test_one_sublayer_can_not_be_replaced_in_two_ways() -> None:
    deletions = plan(("block", 1, "bias"), ("mlp", 1, "none"))
    with raises(SurgeryError, "two-replacements", "mlp 1", "bias", "none"):
        prune_graph(form("pre_norm"), deletions)


VECTOR, MATRIX = np.zeros(8, np.float32), np.zeros((8, 8), np.float32)
WRONG: list[tuple[str, Any, Any, str, object]] = [
    ("linear", VECTOR, None, "numbers-missing", "weight"),
    ("bias", VECTOR, MATRIX, "unasked-weight", "bias"),
    ("bias", VECTOR[1:], None, "wrong-shape", [7]),
    ("linear", VECTOR, MATRIX[:, 1:], "wrong-shape", [8, 7]),
    ("bias", VECTOR + np.nan, None, "not-finite", "bias"),
    ("linear", VECTOR, MATRIX - np.inf, "not-finite", "weight"),
    ("bias", VECTOR.astype(np.int32), None, "wrong-dtype", "INT32"),
    ("none", VECTOR, None, "unasked-numbers", "attention 1"),
    ("mean", VECTOR, None, "unknown-replacement", "'mean'"),
]


@pytest.mark.parametrize(("kind", "bias", "weight", "code", "field"), WRONG)
def test_wrong_numbers_are_refused(
    kind: Any, bias: Any, weight: Any, code: str, field: object
) -> None:
    model, ref = form("pre_norm"), SublayerRef(1, "attention")
    before = text(model)
    deletions = [Deletion(1, "attention", kind)]
    with raises(SurgeryError, code, "attention 1", field):
        prune_graph(model, deletions, replacements={ref: ReplacementTensors(bias, weight)})
    assert text(model) == before


def test_numbers_for_what_is_not_deleted_are_refused() -> None:
    model = form("pre_norm")
    with raises(SurgeryError, "unasked-numbers", "attention 1"):
        prune_graph(model, [Deletion(0, "mlp")], replacements=numbers(model, BIAS))


def test_without_a_known_input_only_a_bias_can_take_the_place() -> None:
    model = fused_model(FusedSpec(layers=3))
    norm = [node for node in model.graph if node.op_type.startswith("Skip")][1]
    odd = ir.node("OddNorm", [norm.outputs[0]], domain="odd", name="odd")
    odd.outputs[0].name, odd.outputs[0].type = "odd_out", ir.TensorType(ir.DataType.FLOAT)
    norm.outputs[0].replace_all_uses_with(odd.outputs[0])
    odd.replace_input_with(0, norm.outputs[0])
    model.graph.insert_after(norm, odd)
    model.graph.opset_imports["odd"] = 1
    site = next(site for site in sites_of(model) if site.ref == SublayerRef(1, "attention"))
    assert site.branch_input is None
    with raises(SurgeryError, "unknown-branch-input", "'odd'"):
        prune_graph(model, LINEAR, replacements=numbers(model, LINEAR))
    prune_graph(model, BIAS, replacements=numbers(model, BIAS))


def test_large_weights_are_read_when_they_are_asked_for() -> None:
    model, reads = form("pre_norm"), Counter[str]()

    def lazily(name: str, array: Any) -> ir.LazyTensor:
        def read() -> ir.TensorProtocol:
            reads[name] += 1
            return ir.tensor(array)

        return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(array.shape))

    ref, right = SublayerRef(1, "attention"), numbers(model, LINEAR)
    one = right[ref]
    given = {ref: ReplacementTensors(lazily("bias", one.bias), lazily("weight", one.weight))}
    pruned, _ = prune_graph(model, LINEAR, replacements=given)
    assert reads["weight"] == 1  # it is checked, and not kept
    assert ir.to_proto(pruned) == ir.to_proto(prune_graph(model, LINEAR, replacements=right)[0])


def test_the_oracle_refuses_missing_numbers() -> None:
    with raises(SurgeryError, "numbers-missing", "attention 1"):
        masked_model(form("pre_norm"), LINEAR)
