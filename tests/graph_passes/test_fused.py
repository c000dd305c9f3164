"""ONNX Runtime's fused graphs: cut right, and still fused where that can be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from fused_graphs import FUSED, FusedSpec, fused_model
from graph_support import (
    all_deletions,
    check_tidy,
    feeds,
    largest_difference,
    oracle_error,
    proper_subsets,
    run,
    session,
    sites_of,
    text,
)

from exporter.artifacts import PlannedDeletion
from exporter.cut.surgery import prune_file
from exporter.errors import VerificationError
from graph_passes import (
    Deletion,
    Refusal,
    SublayerRef,
    SurgeryError,
    find_sites,
    fused_norms,
    prune_graph,
)
from graph_passes.files.storage import save_model
from graph_passes.finding.shapes import head_size
from graph_passes.testing import masked_model
from tests.raising import raises

# A plain norm and a fused one round differently. The largest logit is about 0.7.
TOLERANCE = 1e-6
EXPECTED = [SublayerRef(layer, kind) for layer in range(2) for kind in ("attention", "mlp")]
CACHED = [name for name, spec in FUSED.items() if spec.form == "genai"]
PRE_NORM = [name for name, spec in FUSED.items() if spec.form != "bert" and not spec.parallel]
BIASED = [name for name, spec in FUSED.items() if spec.bias]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def _ask_for_the_branch(model: ir.Model, branch: str) -> ir.Value:
    """Makes the logits depend on a branch's mere shape; gives the branch."""
    (value,) = (v for node in model.graph for v in node.outputs if v.name == branch)
    head = model.graph.outputs[0].producer()
    assert head is not None
    shape = ir.node("Shape", [value])
    sizes = ir.node("Cast", shape.outputs, {"to": ir.DataType.FLOAT})
    size = ir.node("ReduceSum", sizes.outputs, {"keepdims": 0})
    scaled = ir.node("Mul", [head.inputs[0], size.outputs[0]])
    model.graph.insert_before(head, [shape, sizes, size, scaled])
    head.replace_input_with(0, scaled.outputs[0])
    return value


@pytest.mark.parametrize("name", [name for name in FUSED if "int4" not in name])
def test_a_shape_is_inferred_before_sums_are_taken_apart(name: str) -> None:
    model = fused_model(FUSED[name])
    site = next(site for site in sites_of(model) if site.kind == "mlp")
    last = _ask_for_the_branch(model, site.branches[0]).producer()
    assert last is not None
    with raises(SurgeryError, "still-computed", "mlp 0", "Shape"):
        prune_graph(model, [Deletion(0, "mlp")])
    inner, weight = last.inputs
    assert inner is not None
    assert weight is not None
    assert weight.shape is not None
    inner.type = ir.TensorType(ir.DataType.FLOAT)
    inner.shape = ir.Shape(["batch", "seq", weight.shape[0]])
    assert oracle_error(model, [Deletion(0, "mlp")]) < 1e-5  # the logits are some 50 times larger


def skip_norms(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type.startswith("Skip")]


@pytest.mark.parametrize("name", FUSED)
def test_every_sublayer_is_found_in_the_graphs_own_names(name: str) -> None:
    model = fused_model(FUSED[name])
    before = text(model)
    sites = find_sites(model)
    assert [site.ref for site in sites] == EXPECTED  # type: ignore[union-attr]
    joints = {node.name: node for node in skip_norms(model)}
    assert {site.residual_add for site in sites_of(model)} == set(joints)
    for site in sites_of(model):
        operands = {value.name for value in joints[site.residual_add].inputs[:2] if value}
        assert site.skip in operands
        assert set(site.branches) <= operands or FUSED[name].parallel
    assert text(model) == before


@pytest.mark.parametrize("name", FUSED)
def test_everything_equals_the_masked_original_where_it_is_allowed(name: str) -> None:
    model = fused_model(FUSED[name])
    assert oracle_error(model, all_deletions(model), allow_all=True) <= TOLERANCE


@pytest.mark.parametrize("name", PRE_NORM)
def test_neighbours_stay_fused(name: str) -> None:
    model = fused_model(replace(FUSED[name], layers=3))
    before = operators(model)
    skip_norm = skip_norms(model)[0].op_type
    for subset in proper_subsets(all_deletions(model))[::3]:
        after = operators(prune_graph(model, subset)[0])
        first = any(first_of_gpt2(name, deletion) for deletion in subset)
        assert after[skip_norm] == before[skip_norm] - len(subset)
        assert after["Add"] == 0
        assert after["LayerNormalization"] == before["LayerNormalization"] + first
        assert after["SimplifiedLayerNormalization"] == before["SimplifiedLayerNormalization"]


def test_of_a_post_norm_sum_the_norm_stays() -> None:
    model = fused_model(FUSED["bert"])
    for subset in proper_subsets(all_deletions(model)):
        after = operators(prune_graph(model, subset)[0])
        assert after["SkipLayerNormalization"] == 4 - len(subset)
        assert after["LayerNormalization"] == len(subset)
        assert after["Add"] == 0


@pytest.mark.parametrize("name", FUSED)
def test_each_norm_that_is_left_keeps_its_weights_and_epsilon(name: str) -> None:
    model = fused_model(FUSED[name])
    for deletion in all_deletions(model):
        pruned, _ = prune_graph(model, [deletion])
        before = {node.name: norm_settings(node) for node in model.graph if is_norm(node)}
        after = {node.name: norm_settings(node) for node in pruned.graph if is_norm(node)}
        assert after == {name: before[name] for name in after}
        stays = name not in PRE_NORM or first_of_gpt2(name, deletion)
        assert len(before) - len(after) == (0 if stays else 1)


def first_of_gpt2(name: str, deletion: Deletion) -> bool:
    """The norm of GPT-2's embedding is fused as well, and can't be another's."""
    return FUSED[name].form == "gpt2" and deletion == Deletion(0, "attention")


def is_norm(node: ir.Node) -> bool:
    return "Norm" in node.op_type


def norm_settings(node: ir.Node) -> tuple[object, ...]:
    """A norm's weights and epsilon, wherever its operator has them."""
    start, end = 1, 3
    if node.op_type.startswith("Skip"):
        start, end = 2, 3 if "Simplified" in node.op_type else 4
    elif node.op_type == "EmbedLayerNormalization":
        start, end = 5, 7
    weights = [value.name for value in node.inputs[start:end] if value is not None]
    return (*weights, node.attributes.get_float("epsilon", 1e-12))


@pytest.mark.parametrize("name", BIASED)
def test_a_fused_bias_belongs_to_its_branch(name: str) -> None:
    model, plan = fused_model(FUSED[name]), [Deletion(0, "mlp")]
    changed = model.clone()
    bias = skip_norms(changed)[1].inputs[-1]
    assert bias is not None
    bias.const_value = ir.tensor(np.full(bias.shape, 3, np.float32), name=bias.name)  # type: ignore[arg-type]
    feed = feeds(model)[0]
    for make, same in ((lambda m: m, False), (lambda m: masked_model(m, plan), True),
                       (lambda m: prune_graph(m, plan)[0], True)):  # fmt: skip
        one, other = (run(session(make(m), optimise=False), feed) for m in (model, changed))
        difference = largest_difference({"": one["logits"]}, {"": other["logits"]})
        assert (difference == 0.0) == same


def test_a_sum_before_a_plain_add_is_left_alone() -> None:
    """The next sum is not fused: no norm is left to fuse the one before it with."""
    model = fused_model(FUSED["genai_bias"])
    second = skip_norms(model)[1]
    branch, stream, weight, bias = second.inputs
    biased = ir.node("Add", [branch, bias])
    total = ir.node("Add", [stream, biased.outputs[0]], name=second.name)
    norm = ir.node("SimplifiedLayerNormalization", [total.outputs[0], weight], {"epsilon": 1e-5})
    model.graph.insert_before(second, [biased, total, norm])
    second.outputs[0].replace_all_uses_with(norm.outputs[0])
    second.outputs[3].replace_all_uses_with(total.outputs[0])
    model.graph.remove(second, safe=True)
    assert [site.ref for site in sites_of(model)] == EXPECTED
    for subset in proper_subsets(all_deletions(model)):
        assert oracle_error(model, subset) <= TOLERANCE
        check_tidy(prune_graph(model, subset)[0])
    plain, _ = prune_graph(model, [Deletion(0, "mlp")])
    assert operators(plain)["SkipSimplifiedLayerNormalization"] == 2


def test_rms_norms_are_standard_where_the_opset_has_them() -> None:
    model, plan = fused_model(FUSED["genai"]), [Deletion(0, "attention")]
    assert operators(prune_graph(model, plan)[0])["SimplifiedLayerNormalization"] == 1
    model.graph.opset_imports[""] = 23
    assert operators(prune_graph(model, plan)[0])["RMSNormalization"] == 1
    assert oracle_error(model, plan) <= TOLERANCE


def test_a_weight_that_is_computed_too_late_leaves_the_sum_plain() -> None:
    model, plan = fused_model(FUSED["genai_bias"]), [Deletion(0, "mlp")]
    second = skip_norms(model)[1]
    late = ir.node("Abs", [second.inputs[2]])  # type: ignore[list-item]
    model.graph.insert_before(second, late)
    second.replace_input_with(2, late.outputs[0])
    pruned, _ = prune_graph(model, plan)
    assert operators(pruned)["SkipSimplifiedLayerNormalization"] == 2
    assert operators(pruned)["Add"] == 2
    check_tidy(pruned)
    assert oracle_error(model, plan) <= TOLERANCE


@pytest.mark.parametrize("name", CACHED)
def test_caches_go_and_are_renumbered(name: str) -> None:
    plan = [Deletion(0, "attention")]
    pruned, report = prune_graph(fused_model(FUSED[name]), plan, renumber_kv=True)
    names = [value.name for value in (*pruned.graph.inputs, *pruned.graph.outputs)]
    assert report.deleted[0].inputs_removed == ("past_key_values.0.key", "past_key_values.0.value")
    assert "past_key_values.0.key" in names
    assert not any(".1." in (name or "") for name in names)


def test_verification_catches_a_wrong_fused_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(fused_model(FUSED["genai_bias"]), tmp_path / "source.onnx")
    right = fused_norms.join

    def wrong(graph: ir.Graph, parts: list[fused_norms.Apart], biases: set[ir.Node]) -> None:
        right(graph, parts, biases)
        norm = next(n for n in graph if n.op_type.startswith("Skip"))
        norm.replace_input_with(3, None)  # the bias of the branch that stays

    monkeypatch.setattr(fused_norms, "join", wrong)
    plan = [PlannedDeletion(layer=0, kind="attention")]
    with raises(VerificationError, "wrong-results"):
        prune_file(tmp_path / "source.onnx", tmp_path / "out" / "m.onnx", plan)


def test_a_skip_norm_whose_statistics_are_read_is_refused() -> None:
    model = fused_model(FUSED["genai_layer_norm"])
    mean = skip_norms(model)[2].outputs[1]
    mean.name, mean.type = "mean", ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(mean)
    (refusal,) = find_sites(model)
    assert isinstance(refusal, Refusal)
    assert (refusal.node, refusal.code) == (skip_norms(model)[2].name, "fused-residual")
    with raises(SurgeryError, "sublayer-missing", "mlp 0", refusal.node):
        prune_graph(model, [Deletion(0, "mlp")])


def test_a_packed_matrix_counts_by_its_numbers() -> None:
    packed, plain = (sites_of(fused_model(FUSED[name])) for name in ("genai_int4", "genai"))
    assert [site.parameters for site in packed] == [site.parameters for site in plain]


def test_a_deep_graph_stays_fused() -> None:
    model = fused_model(FusedSpec(layers=12))
    plan = [Deletion(layer, "attention") for layer in range(0, 12, 2)]
    plan += [Deletion(layer, "mlp") for layer in (0, 1, 2, 11)]
    assert oracle_error(model, plan) <= TOLERANCE
    pruned, _ = prune_graph(model, plan)
    assert operators(pruned)["SkipSimplifiedLayerNormalization"] == 24 - len(plan)
    assert operators(pruned)["SimplifiedLayerNormalization"] == 1


def cache(*dims: int | str) -> ir.Value:
    return ir.Value(name="past", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(dims))


def test_a_head_size_that_is_not_declared_follows_from_the_reader() -> None:
    past = cache("batch", 2, "past", "kv_cache_dim")
    assert head_size(past) is None
    packed = cache("batch", "seq", 4 * 16 + 2 * 2 * 16)
    heads = {"num_heads": 4, "kv_num_heads": 2}
    ir.node("GroupQueryAttention", [packed, None, None, past], heads, domain="com.microsoft")
    assert head_size(past) == 16
    past, query = cache("batch", 2, "past", "kv_cache_dim"), cache("batch", "seq", 4 * 24)
    ir.node("GroupQueryAttention", [query, query, query, past], heads, domain="com.microsoft")
    assert head_size(past) == 24
    past = cache("batch", 2, "past", "kv_cache_dim")
    quantised = ir.node("QuantizeLinear", [packed, ir.Value(name="scale")])
    restored = ir.node("DequantizeLinear", [quantised.outputs[0], ir.Value(name="scale")])
    ir.node("GroupQueryAttention", [restored.outputs[0], None, None, past], heads)
    assert head_size(past) == 16
    past = cache("batch", 2, "past", "kv_cache_dim")
    ir.node("Concat", [past, cache("batch", 2, "seq", 8)], {"axis": 2})
    assert head_size(past) == 8
    assert head_size(cache("batch", 2, "past", 4)) == 4


def _squeeze_the_mlp(model: ir.Model) -> None:
    """Gives layer 0's MLP a single position, which the sum with the attention broadcasts."""
    site = next(s for s in sites_of(model) if s.ref == SublayerRef(0, "mlp"))
    (mlp,) = (v for node in model.graph for v in node.outputs if v.name in site.branches)
    (joint,) = (user for user, _ in mlp.uses())
    mean = ir.node("ReduceMean", [mlp], {"axes": [1], "keepdims": 1})
    mean.outputs[0].type, mean.outputs[0].shape = mlp.type, ir.Shape(["batch", 1, 32])
    model.graph.insert_before(joint, mean)
    joint.replace_input_with(joint.inputs.index(mlp), mean.outputs[0])


def test_a_branch_that_only_broadcasts_is_not_fused_with_the_norm() -> None:
    model = fused_model(FUSED["genai_parallel"])
    model.opset_imports[""] = min(model.opset_imports[""], 17)  # ReduceMean's axes as attribute
    _squeeze_the_mlp(model)
    (skip,) = {s.skip for s in sites_of(model) if s.layer == 0}
    for value in (v for node in model.graph for v in node.outputs if v.name == skip):
        value.shape = ir.Shape(["batch", "seq", 32])
    cut, _ = prune_graph(model, [Deletion(0, "attention")])
    assert operators(cut)["SkipSimplifiedLayerNormalization"] == (
        operators(model)["SkipSimplifiedLayerNormalization"] - 1
    )
    assert oracle_error(model, [Deletion(0, "attention")]) < TOLERANCE


@pytest.mark.parametrize("name", ["genai", "genai_bias", "gpt2", "genai_layer_norm"])
def test_sums_that_are_all_public_keep_nodes_of_different_names(name: str) -> None:
    """Two public names stay apart by an Identity, which must not be called like the norm."""
    model = fused_model(FUSED[name])
    skips = {site.skip for site in sites_of(model)}
    model.graph.outputs.extend(
        value
        for node in model.graph
        for value in node.outputs
        if value.name in skips and not value.is_graph_output()
    )
    for subset in proper_subsets(all_deletions(model)):
        pruned, _ = prune_graph(model, subset)
        names = Counter(node.name for node in pruned.graph)
        assert max(names.values()) == 1, subset
        assert oracle_error(model, subset) <= TOLERANCE
    assert "Identity" in operators(pruned)
