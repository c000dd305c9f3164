"""A bias or a linear map in a deleted branch's place equals the masked original plus the same."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graph_passes import Deletion, ReplacementTensors, SublayerRef, SurgeryError, prune_graph
from graph_passes.testing import masked_model
from tests.graph_passes.fused_graphs import FUSED, FusedSpec, fused_model
from tests.graph_passes.graph_support import (
    GRAPHS,
    Given,
    all_deletions,
    feeds,
    kinds,
    largest_difference,
    numbers,
    operators,
    oracle_error,
    plan,
    pruned_soundly,
    put_behind,
    run,
    sites_of,
    text,
    tiny,
    usual,
    value_of,
)
from tests.graph_passes.test_fused import CASES as QUANTISED
from tests.graph_passes.test_fused import MAKERS
from tests.graph_passes.test_refusals import Cached, CrossAttention
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_model

# Sums are taken in another order, and a bias is rounded once more; relative to the largest output.
TOLERANCE = 2e-6
REF = SublayerRef(1, "attention")
LINEAR, BIAS = plan(("attention", 1, "linear")), plan(("attention", 1, "bias"))


def random_plan(model: ir.Model, seed: int) -> list[Deletion]:
    """Any number of sublayers but all, each with any replacement."""
    choice = random.Random(seed)
    everything = all_deletions(model)
    subset = choice.sample(everything, choice.randint(2, len(everything) - 1))
    return [replace(d, replacement=choice.choice(["none", "bias", "linear"])) for d in subset]


def with_numbers(
    model: ir.Model, deletions: list[Deletion], **how: Any
) -> tuple[ir.Model, Counter[str], Any]:
    """The result of a cut with random numbers, what it has beyond a bare cut, and its report."""
    bare, _ = prune_graph(model, [replace(d, replacement="none") for d in deletions])
    pruned, report = pruned_soundly(model, deletions, numbers(model, deletions, **how))
    return pruned, operators(pruned) - operators(bare), report


@pytest.mark.parametrize("name", GRAPHS)
def test_random_sets_equal_the_masked_original(name: str) -> None:
    model = tiny(name)
    for seed in range(3):
        deletions = random_plan(model, seed)
        given = numbers(model, deletions, seed=seed)
        assert oracle_error(model, deletions, given, optimise=seed == 0) <= TOLERANCE


@pytest.mark.parametrize("name", GRAPHS)
def test_everything_is_replaced_where_it_is_allowed(name: str) -> None:
    model = tiny(name)
    deletions = [replace(d, replacement="linear") for d in all_deletions(model)]
    assert oracle_error(model, deletions, numbers(model, deletions), allow_all=True) <= TOLERANCE


_forms = st.sampled_from(["pre_norm", "post_norm", "norm_after", "parallel_in_turn", "split_mlp"])
_specs = st.builds(TinySpec, form=_forms, layers=st.integers(1, 4), annotated=st.booleans())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spec=_specs, data=st.data())
def test_any_model_any_replacements(spec: TinySpec, data: st.DataObject) -> None:
    model = tiny_model(spec, seed=1)
    kept = st.sampled_from(["keep", "none", "bias", "linear"])
    chosen = [(d, data.draw(kept)) for d in all_deletions(model)[1:]]
    deletions = [replace(d, replacement=kind) for d, kind in chosen if kind != "keep"]
    if deletions:
        assert oracle_error(model, deletions, numbers(model, deletions)) <= TOLERANCE


@pytest.mark.parametrize(("maker", "name"), QUANTISED)
def test_quantised_and_optimised_graphs(maker: str, name: str, tmp_path: Path) -> None:
    model = MAKERS[maker](tiny(name, layers=2), tmp_path)
    deletions = plan(("attention", 0, "linear"), ("mlp", 0, "bias"), ("attention", 1, "bias"))
    given, others = (numbers(model, deletions, seed=seed) for seed in (0, 9))
    assert oracle_error(model, deletions, given) <= TOLERANCE
    first = SublayerRef(0, "attention")
    assert oracle_error(model, deletions, given, other={**given, first: others[first]}) > 1e-3


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
    # Half a dozen roundings of 1e-3 each, in another order.
    assert oracle_error(model, deletions, given) < 5e-3
    assert oracle_error(model, deletions, given, other=numbers(model, deletions, seed=1)) > 5e-2
    pruned, _ = prune_graph(model, deletions, replacements=given)
    assert pruned.graph.initializers["depthcut.attention.1.weight"].dtype == ir.DataType.FLOAT16
    too_large = ReplacementTensors(np.full(8, 1e5, np.float32))
    with raises(SurgeryError, "too-large", "FLOAT16"):
        prune_graph(model, BIAS, replacements={REF: too_large})


def test_an_input_of_another_type_is_cast() -> None:
    model = tiny("pre_norm")
    normed = next(n for n in model.graph if n.op_type == "LayerNormalization").outputs[0]
    up = ir.node("Cast", [normed], {"to": ir.DataType.DOUBLE}, name="up")
    down = ir.node("Cast", [up.outputs[0]], {"to": ir.DataType.FLOAT}, name="down")
    for i, made in enumerate((up, down)):
        made.outputs[0].name = f"form{i}"
    put_behind(model, normed, up, down)
    deletions = plan(("attention", 0, "linear"))
    assert sites_of(model)[0].branch_input == "form1"
    assert oracle_error(model, deletions, numbers(model, deletions)) <= TOLERANCE


@pytest.mark.parametrize("name", ["pre_norm", "norm_after", "parallel", "genai", "bert"])
def test_the_oracle_catches_other_numbers(name: str) -> None:
    model = tiny(name)
    given = numbers(model, LINEAR)
    bias, weight = np.array(given[REF].bias), np.array(given[REF].weight)
    other_bias, other_weight = bias.copy(), weight.copy()
    other_bias[3] += 0.1
    other_weight[1, 2] += 0.5
    for wrong in ((other_bias, weight), (bias, other_weight), (bias, weight.T)):
        other = {REF: ReplacementTensors(*wrong)}
        assert oracle_error(model, LINEAR, given, other=other) > 1e-4


# Where the numbers go


@pytest.mark.parametrize("name", ["pre_norm", "sandwich", "parallel"])
def test_a_linear_map_stands_behind_the_norm_and_the_cache_goes(name: str) -> None:
    model = tiny(name)
    pruned, _, report = with_numbers(model, LINEAR)
    (product,) = (node for node in pruned.graph if node.name == "depthcut.attention.1.matmul")
    norm = product.inputs[0].producer()  # type: ignore[union-attr]
    assert norm is not None
    assert norm.op_type == "LayerNormalization"
    assert operators(pruned)["Transpose"] == operators(model)["Transpose"] - 5
    assert report.deleted[0].replacement == "linear"
    assert report.deleted[0].parameters_added == 8 * 8 + 8
    assert report.deleted[0].inputs_removed == ("past_key_values.1.key", "past_key_values.1.value")


def test_one_constant_add_takes_the_place_of_neighbouring_branches() -> None:
    neighbours = plan(("attention", 1, "bias"), ("mlp", 1, "bias"), ("attention", 2, "bias"))
    for deletions in (BIAS, neighbours):
        _, added, report = with_numbers(tiny("pre_norm"), deletions)
        assert added == {"Add": 1}
        assert sum(entry.parameters_added for entry in report.deleted) == 8


@pytest.mark.parametrize("name", FUSED)
def test_fused_norms_stay_fused(name: str) -> None:
    model = tiny(name)
    before = operators(model)
    after = operators(with_numbers(model, LINEAR)[0])
    skips = [op for op in after if op.startswith("Skip")]
    assert [after[op] for op in skips] == [before[op] for op in skips]
    # Of parallel branches the sum is an Add of its own, so the map's bias is one too.
    assert after["Add"] == before["Add"] + FUSED[name].parallel
    assert with_numbers(model, BIAS)[1] == {}


def add_bias(model: ir.Model, home: SublayerRef) -> None:
    """Puts a constant Add behind a branch."""
    (branch,) = (site.branches[0] for site in sites_of(model) if site.ref == home)
    value = value_of(model, branch)
    bias = ir.Value(name="own_bias", type=value.type, shape=ir.Shape([8]))
    bias.const_value = ir.tensor(np.linspace(0, 1, 8, dtype=np.float32), name="own_bias")
    model.graph.register_initializer(bias)
    add = ir.node("Add", [value, bias], name="own_add")
    add.outputs[0].name, add.outputs[0].type = "own_sum", value.type
    put_behind(model, value, add)


def folded_into(model: ir.Model, name: str) -> list[str]:
    """Where a bias has gone, as the record says it."""
    into: list[str] = json.loads(model.metadata_props["depthcut.replacements"])[name]["folded_into"]
    return into


@pytest.mark.parametrize("name", ["pre_norm", "parallel", "parallel_in_turn"])
def test_a_bias_goes_to_the_one_before_it_and_ties_the_two(name: str) -> None:
    model = tiny(name)
    home = SublayerRef(0 if name == "pre_norm" else 1, "mlp")
    add_bias(model, home)
    assert oracle_error(model, BIAS, numbers(model, BIAS)) <= TOLERANCE
    pruned, added, report = with_numbers(model, BIAS)
    assert added == {}
    assert report.deleted[0].parameters_added == 0
    assert folded_into(pruned, "attention 1") == [str(home)]
    with raises(SurgeryError, "bias-folded", home, "attention 1"):
        prune_graph(pruned, [Deletion(home.layer, home.kind)])
    assert prune_graph(pruned, [Deletion(2, "mlp")])


def test_a_bias_whose_sum_is_read_or_shared_stays_alone() -> None:
    model = tiny("pre_norm")
    add_bias(model, SublayerRef(0, "mlp"))
    # What is before it is read by the norm of attention 1.
    pruned, _, report = with_numbers(model, plan(("mlp", 1, "bias")))
    assert report.deleted[0].parameters_added == 8
    assert folded_into(pruned, "mlp 1") == []


# What was cut before


@pytest.mark.parametrize("name", ["pre_norm", "norm_after", "parallel", "genai", "genai_bias"])
def test_in_two_steps_it_is_the_same(name: str) -> None:
    model = tiny(name)
    first, second = plan(("attention", 1, "linear")), plan(("mlp", 2, "linear"))
    given = numbers(model, [*first, *second])
    halves = [{ref: g} for ref, g in given.items()]
    once, _ = prune_graph(model, [*first, *second], replacements=given)
    twice, _ = prune_graph(model, first, replacements=halves[0])
    assert kinds(twice) == [ref for ref in usual() if ref != (1, "attention")]
    twice, _ = prune_graph(twice, second, replacements=halves[1])
    assert twice.metadata_props == once.metadata_props
    for feed in feeds(once):
        assert largest_difference(run(once, feed), run(twice, feed)) <= TOLERANCE
    same, report = prune_graph(once, [*first, *second], replacements=given)
    assert report.deleted == ()
    assert text(same) == text(once)


def unbiased(given: Given) -> Given:
    return {r: ReplacementTensors(np.zeros_like(one.bias), one.weight) for r, one in given.items()}


def test_other_replacements_than_the_recorded_ones_are_an_error() -> None:
    model = tiny("pre_norm")
    given, others = (numbers(model, LINEAR, seed=seed) for seed in (0, 1))
    pruned, _ = prune_graph(model, LINEAR, replacements=given)
    for kind in ("none", "bias"):
        deletions = plan(("attention", 1, kind), ("mlp", 2, "none"))
        with raises(SurgeryError, "other-numbers", "attention 1", "'linear'"):
            prune_graph(pruned, deletions, replacements=numbers(model, deletions))
    with raises(SurgeryError, "other-numbers"):
        prune_graph(pruned, LINEAR, replacements=others)
    # Maps without a bias are told apart by their weights.
    pruned, _ = prune_graph(model, LINEAR, replacements=unbiased(given))
    assert prune_graph(pruned, LINEAR, replacements=unbiased(given))[1].deleted == ()
    with raises(SurgeryError, "other-numbers"):
        prune_graph(pruned, LINEAR, replacements=unbiased(others))


def test_a_graph_whose_linear_map_is_lost_is_refused() -> None:
    model = tiny("pre_norm")
    pruned, _, _ = with_numbers(model, LINEAR)
    model.metadata_props["depthcut.plan"] = pruned.metadata_props["depthcut.plan"]
    assert sites_of(pruned)
    assert sites_of(model) == []


def test_a_block_takes_a_replacement_for_each_of_its_sublayers() -> None:
    model, deletions = tiny("pre_norm"), plan(("block", 1, "linear"))
    given = numbers(model, deletions)
    assert len(given) == 2
    assert oracle_error(model, deletions, given) <= TOLERANCE
    del given[SublayerRef(1, "mlp")]
    with raises(SurgeryError, "numbers-missing", "mlp 1"):
        prune_graph(model, deletions, replacements=given)


@pytest.mark.parametrize("builder", [CrossAttention, Cached])
def test_cross_attention_is_replaced_too(builder: type[CrossAttention]) -> None:
    model = builder(TinySpec(layers=2), 0).build()
    deletions = plan(("attention", 0, "bias"), ("cross_attention", 0, "linear"), ("mlp", 1, "bias"))
    given = numbers(model, deletions)
    assert oracle_error(model, deletions, given) <= TOLERANCE
    assert oracle_error(model, deletions, given, other=numbers(model, deletions, seed=1)) > 1e-2
    pruned, _ = prune_graph(model, deletions, replacements=given)
    assert not any(".0.encoder" in (value.name or "") for value in pruned.graph.inputs)


# Numbers that are wrong


def matrix(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


WRONG: list[tuple[str, ReplacementTensors, str, tuple[object, ...]]] = [
    ("linear", ReplacementTensors(matrix(8)), "numbers-missing", ("weight",)),
    ("bias", ReplacementTensors(matrix(8), matrix(8, 8)), "other-numbers", ("bias",)),
    ("bias", ReplacementTensors(matrix(7)), "wrong-shape", ([7],)),
    ("linear", ReplacementTensors(matrix(8), matrix(8, 7)), "wrong-shape", ([8, 7],)),
    ("bias", ReplacementTensors(matrix(8) * np.nan), "not-finite", ("bias",)),
    ("linear", ReplacementTensors(matrix(8), matrix(8, 8) * np.inf), "not-finite", ("weight",)),
    ("bias", ReplacementTensors(matrix(8).astype(np.int32)), "wrong-dtype", ("INT32",)),
    ("none", ReplacementTensors(matrix(8)), "other-numbers", ()),
    ("mean", ReplacementTensors(matrix(8)), "unknown-replacement", ("'mean'",)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "tensors", "code", "fields"), WRONG)
def test_wrong_numbers_are_refused(
    kind: Any, tensors: ReplacementTensors, code: str, fields: tuple[object, ...]
) -> None:
    model = tiny("pre_norm")
    before = text(model)
    with raises(SurgeryError, code, "attention 1", *fields):
        prune_graph(model, [Deletion(1, "attention", kind)], replacements={REF: tensors})
    assert text(model) == before


def test_numbers_for_what_is_not_deleted_are_refused_and_the_oracle_misses_none() -> None:
    model = tiny("pre_norm")
    with raises(SurgeryError, "other-numbers", "attention 1"):
        prune_graph(model, [Deletion(0, "mlp")], replacements=numbers(model, BIAS))
    with raises(SurgeryError, "numbers-missing", "attention 1"):
        masked_model(model, LINEAR)


def test_without_a_known_input_only_a_bias_can_take_the_place() -> None:
    model = fused_model(FusedSpec(layers=3))
    normed = [node for node in model.graph if node.op_type.startswith("Skip")][1].outputs[0]
    odd = ir.node("OddNorm", [normed], domain="odd", name="odd")
    odd.outputs[0].name, odd.outputs[0].type = "odd_out", ir.TensorType(ir.DataType.FLOAT)
    put_behind(model, normed, odd)
    model.graph.opset_imports["odd"] = 1
    assert next(site for site in sites_of(model) if site.ref == REF).branch_input is None
    with raises(SurgeryError, "unknown-replacement", "'odd'"):
        prune_graph(model, LINEAR, replacements=numbers(model, LINEAR))
    prune_graph(model, BIAS, replacements=numbers(model, BIAS))


def test_large_weights_are_read_when_they_are_asked_for() -> None:
    model, reads = tiny("pre_norm"), Counter[str]()

    def lazily(name: str, array: Any) -> ir.LazyTensor:
        def read() -> ir.TensorProtocol:
            reads[name] += 1
            return ir.tensor(array)

        return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(array.shape))

    right = numbers(model, LINEAR)
    one = right[REF]
    given = {REF: ReplacementTensors(lazily("bias", one.bias), lazily("weight", one.weight))}
    pruned, _ = prune_graph(model, LINEAR, replacements=given)
    assert reads["weight"] == 1  # it is checked, and not kept
    assert ir.to_proto(pruned) == ir.to_proto(prune_graph(model, LINEAR, replacements=right)[0])
