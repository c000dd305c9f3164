"""The finder: what is a sublayer, which layer and kind it is, and that names decide nothing."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from graph_support import SPECS, sites_of, text, tiny

from graph_passes import Deletion, SublayerRef, find_sites, prune_graph
from graph_passes.finding.labels import number_layers
from tests.tiny_graphs import TinySpec, tiny_model

EXPECTED = [SublayerRef(layer, kind) for layer in range(3) for kind in ("attention", "mlp")]


@pytest.mark.parametrize("name", SPECS)
def test_every_form_shows_each_sublayer_once(name: str) -> None:
    sites = find_sites(tiny(name))
    assert [site.ref for site in sites] == EXPECTED  # type: ignore[union-attr]


@pytest.mark.parametrize("name", SPECS)
def test_finding_changes_nothing(name: str) -> None:
    model = tiny(name)
    before = text(model)
    find_sites(model)
    assert text(model) == before


@pytest.mark.parametrize("name", SPECS)
def test_names_decide_nothing(name: str) -> None:
    model = tiny(name)
    expected = [(s.ref, s.parameters, len(s.kv_inputs)) for s in sites_of(model)]
    for i, node in enumerate(model.graph):
        node.name = f"mlp.{i}.attention"
        for value in node.outputs:
            value.name = f"self_attn_{i}_{value.index()}"
    for i, value in enumerate(model.graph.inputs):
        value.name = f"mask_{i}"
    assert [(s.ref, s.parameters, len(s.kv_inputs)) for s in sites_of(model)] == expected


def test_a_site_tells_where_it_is_and_what_it_owns() -> None:
    site = sites_of(tiny("pre_norm"))[2]
    assert site.kv_inputs == ("past_key_values.1.key", "past_key_values.1.value")
    assert site.kv_outputs == ("present.1.key", "present.1.value")
    assert site.parameters == 4 * 8 * 8 + 2 * 8  # four projections and the norm before them
    assert len(site.branches) == 1


def test_a_norm_shared_by_parallel_branches_belongs_to_neither() -> None:
    attention, mlp = sites_of(tiny("parallel"))[:2]
    assert attention.residual_add == mlp.residual_add
    assert attention.parameters == 4 * 8 * 8
    assert mlp.parameters == 2 * 8 * 16


def test_parts_of_one_mlp_go_together() -> None:
    mlp = sites_of(tiny("split_mlp"))[1]
    assert len(mlp.branches) == 2
    assert mlp.parameters == 2 * 2 * 8 * 16 + 2 * 8


def test_an_encoder_has_no_caches() -> None:
    assert all(not site.kv_inputs for site in sites_of(tiny("post_norm_encoder")))


def test_a_tied_table_belongs_to_no_sublayer() -> None:
    tied, untied = sites_of(tiny("tied")), sites_of(tiny("pre_norm"))
    assert [s.parameters for s in tied] == [s.parameters for s in untied]


def test_a_pruned_graph_keeps_the_original_numbers() -> None:
    pruned, _ = prune_graph(tiny("pre_norm"), [Deletion(0, "block"), Deletion(1, "attention")])
    assert [site.ref for site in sites_of(pruned)] == [EXPECTED[3], *EXPECTED[4:]]


def test_without_its_record_a_pruned_graph_is_numbered_anew() -> None:
    pruned, _ = prune_graph(tiny("pre_norm"), [Deletion(0, "block")])
    pruned.metadata_props.clear()
    assert [site.layer for site in sites_of(pruned)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "broken", ["not json", "3", '[{"layer": "x"}]', '[{"kind": "nonsense", "layer": 0}]']
)
def test_an_unreadable_record_is_no_obstacle(broken: str) -> None:
    model = tiny("pre_norm")
    model.metadata_props["depthcut.plan"] = broken
    assert [site.ref for site in sites_of(model)] == EXPECTED


def test_layers_without_attention_are_counted() -> None:
    groups = [["attention"], ["mlp"], ["mixer"], ["mlp"], ["attention"], ["mlp"]]
    assert number_layers(groups, []) == [[0], [0], [1], [1], [2], [2]]


def test_cross_attention_belongs_to_its_layer() -> None:
    groups = [["attention"], ["cross_attention"], ["mlp"]] * 2
    assert number_layers(groups, []) == [[0], [0], [0], [1], [1], [1]]


def test_what_was_cut_from_both_sides_of_a_boundary_leaves_its_places() -> None:
    missing = [SublayerRef(0, "mlp"), SublayerRef(1, "attention")]
    assert number_layers([["attention"], ["mlp"]], missing) == [[0], [1]]
    assert number_layers([["attention"], ["mlp"]], []) == [[0], [0]]


def test_deep_graphs_are_found_whole() -> None:
    sites = sites_of(tiny_model(TinySpec(layers=24, annotated=False)))
    assert len(sites) == 48
    assert sites[-1].layer == 23


def test_weights_are_not_read() -> None:
    model = tiny("pre_norm")
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.ExternalTensor(
            "nowhere.data", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape),
            name=value.name or "", base_dir="/nonexistent",
        )  # fmt: skip
    assert [site.ref for site in sites_of(model)] == EXPECTED
    pruned, _ = prune_graph(model, [Deletion(0, "attention"), Deletion(2, "mlp")])
    assert len(pruned.graph.initializers) < len(model.graph.initializers)
