"""What a pass promises: honest flags, an unharmed original, the same bytes every time."""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest
from graph_support import (
    GRAPHS,
    check_clean,
    feeds,
    largest_difference,
    run,
    session,
    sites_of,
    text,
    tiny,
)

from graph_passes import Deletion, SurgeryError, prune_graph
from graph_passes.cleanup import CleanupPass
from graph_passes.delete_sublayers import DeleteSublayersPass
from graph_passes.pipeline import graph_size
from tests.raising import raises

PLAN = [Deletion(1, "attention"), Deletion(2, "mlp")]


@pytest.mark.parametrize("name", GRAPHS)
def test_the_callers_model_survives_success(name: str) -> None:
    model = tiny(name)
    before = text(model), dict(model.metadata_props)
    prune_graph(model, PLAN)
    assert (text(model), dict(model.metadata_props)) == before


@pytest.mark.parametrize(
    "plan",
    [[], [Deletion(9, "mlp")], [Deletion(0, "mlp", "linear")], [*PLAN, Deletion(0, "mixer")]],
)
def test_the_callers_model_survives_failure(plan: list[Deletion]) -> None:
    model = tiny("pre_norm")
    before = text(model)
    with pytest.raises(SurgeryError):
        prune_graph(model, plan)
    assert text(model) == before


@pytest.mark.parametrize("name", ["pre_norm", "genai"])
def test_the_pass_refuses_before_it_changes(name: str) -> None:
    model = tiny(name)
    before = text(model)
    with pytest.raises(SurgeryError):
        DeleteSublayersPass([Deletion(0, "mlp"), Deletion(9, "mlp")])(model)
    assert text(model) == before


@pytest.mark.parametrize("name", GRAPHS)
def test_the_flag_is_honest_and_a_second_run_changes_nothing(name: str) -> None:
    model = tiny(name)
    for made in (DeleteSublayersPass(PLAN), CleanupPass()):
        before = text(model)
        assert made(model).modified == (text(model) != before)
    before = text(model)
    assert not DeleteSublayersPass(PLAN)(model).modified
    assert not CleanupPass()(model).modified
    assert text(model) == before


def test_cleaning_a_graph_that_has_something_dead_says_so() -> None:
    model = tiny("pre_norm")
    model.graph.append(ir.node("Neg", [model.graph[0].outputs[0]]))
    assert CleanupPass()(model).modified
    assert not CleanupPass()(model).modified


@pytest.mark.parametrize("name", GRAPHS)
def test_the_same_call_gives_the_same_bytes(name: str) -> None:
    first, second = (
        ir.to_proto(prune_graph(tiny(name), plan)[0]).SerializeToString(deterministic=True)
        for plan in (PLAN, list(reversed(PLAN)))
    )
    assert first == second


def test_a_block_is_all_sublayers_of_its_layer() -> None:
    as_block, report = prune_graph(tiny("pre_norm"), [Deletion(1, "block")])
    parts = [Deletion(1, "attention"), Deletion(1, "mlp")]
    assert text(as_block) == text(prune_graph(tiny("pre_norm"), parts)[0])
    assert [(entry.layer, entry.kind) for entry in report.deleted] == [(1, "attention"), (1, "mlp")]


def test_what_is_named_twice_counts_once() -> None:
    twice = [*PLAN, *PLAN, Deletion(1, "attention")]
    assert text(prune_graph(tiny("pre_norm"), twice)[0]) == text(
        prune_graph(tiny("pre_norm"), PLAN)[0]
    )


@pytest.mark.parametrize("name", GRAPHS)
def test_the_report_adds_up(name: str) -> None:
    model = tiny(name)
    pruned, report = prune_graph(model, PLAN)
    assert report.before == graph_size(model)
    assert report.after == graph_size(pruned)
    gone = [value.name for value in model.graph.inputs if value.name not in _names(pruned)]
    assert [name for entry in report.deleted for name in entry.inputs_removed] == gone
    nodes = report.before.nodes - report.after.nodes
    assert sum(entry.nodes_removed for entry in report.deleted) == pytest.approx(nodes, abs=2)
    weights = report.before.parameters - report.after.parameters
    assert sum(entry.parameters_removed for entry in report.deleted) == weights


def _names(model: ir.Model) -> set[str | None]:
    return {value.name for value in model.graph.inputs}


def test_the_plan_stands_in_the_metadata() -> None:
    pruned, _ = prune_graph(tiny("pre_norm"), PLAN)
    assert json.loads(pruned.metadata_props["depthcut.plan"]) == [
        {"kind": "attention", "layer": 1, "replacement": "none"},
        {"kind": "mlp", "layer": 2, "replacement": "none"},
    ]


@pytest.mark.parametrize("name", GRAPHS)
def test_cutting_in_two_steps_is_cutting_at_once(name: str) -> None:
    once, _ = prune_graph(tiny(name), PLAN)
    step, _ = prune_graph(tiny(name), PLAN[:1])
    twice, _ = prune_graph(step, PLAN[1:])
    assert once.metadata_props == twice.metadata_props
    assert [site.ref for site in sites_of(once)] == [site.ref for site in sites_of(twice)]
    for feed in feeds(once):
        one, other = (run(session(model, optimise=False), feed) for model in (once, twice))
        assert largest_difference(one, other) == 0.0


def test_a_sum_that_is_an_output_keeps_its_name_and_shape() -> None:
    model = tiny("pre_norm")
    adds = [node for node in model.graph if node.name == sites_of(model)[1].residual_add]
    total = adds[0].outputs[0]
    total.name = "hidden_states"
    model.graph.outputs.append(total)
    pruned, _ = prune_graph(model, [Deletion(0, "mlp")])
    check_clean(pruned)
    assert [v.name for v in pruned.graph.outputs] == [v.name for v in model.graph.outputs]


def test_two_public_values_stay_apart() -> None:
    model = tiny("pre_norm")
    by_name = {node.name: node for node in model.graph}
    for i, site in enumerate(sites_of(model)[:2]):
        total = by_name[site.residual_add].outputs[0]
        total.name = f"hidden_states.{i}"
        model.graph.outputs.append(total)
    pruned, _ = prune_graph(model, [Deletion(0, "mlp")])
    check_clean(pruned)
    assert [v.name for v in pruned.graph.outputs] == [v.name for v in model.graph.outputs]
    assert "Identity" in {node.op_type for node in pruned.graph}


def test_renumbering_makes_the_caches_dense_and_keeps_the_map() -> None:
    plan = [Deletion(0, "attention")]
    pruned, report = prune_graph(tiny("pre_norm"), plan, renumber_kv=True)
    names = [value.name for value in (*pruned.graph.inputs, *pruned.graph.outputs)]
    assert "past_key_values.0.key" in names
    assert "present.1.value" in names
    assert not any(".2." in (name or "") for name in names)
    assert report.kv_renumbering["past_key_values.1.key"] == "past_key_values.0.key"
    assert json.loads(pruned.metadata_props["depthcut.kv_renumbering"]) == report.kv_renumbering
    check_clean(pruned)


def test_numbers_stay_by_default() -> None:
    pruned, report = prune_graph(tiny("pre_norm"), [Deletion(0, "attention")])
    assert "past_key_values.2.key" in _names(pruned)
    assert report.kv_renumbering == {}


def test_names_without_a_number_are_not_renumbered() -> None:
    model = tiny("pre_norm")
    model.graph.inputs[-1].name = "the_last_cache"
    with raises(SurgeryError, "cache-not-numbered", "the_last_cache"):
        prune_graph(model, [Deletion(0, "attention")], renumber_kv=True)


def test_mask_and_ids_stay_declared_when_no_attention_is_left() -> None:
    plan = [Deletion(layer, "attention") for layer in range(3)]
    pruned, _ = prune_graph(tiny("pre_norm"), plan)
    assert [v.name for v in pruned.graph.inputs] == ["input_ids", "attention_mask"]
    assert [v.name for v in pruned.graph.outputs] == ["logits"]
