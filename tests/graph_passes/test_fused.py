"""ONNX Runtime's fused and quantised graphs: cut right, and still fused where that can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.cut.surgery import prune_file
from graph_passes import Deletion, SublayerRef, prune_graph, save_model
from graph_passes.finding.shapes import head_size
from graph_passes.pipeline import graph_size
from graph_passes.testing import masked_model
from tests.graph_passes.fused_graphs import FUSED
from tests.graph_passes.graph_support import (
    SPECS,
    Arrays,
    all_deletions,
    check_refused,
    feeds,
    kinds,
    logits_apart,
    operators,
    oracle_error,
    proper_subsets,
    publish,
    put_behind,
    sites_of,
    tiny,
    usual,
    value_of,
)

# A plain norm and a fused one round differently. The largest logit is about 0.7.
TOLERANCE = 1e-6
PRE_NORM = [name for name, spec in FUSED.items() if spec.form != "bert" and not spec.parallel]
SKIP = "SkipSimplifiedLayerNormalization"


def skip_norms(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type.startswith("Skip")]


def first_of_gpt2(name: str, deletion: Deletion) -> bool:
    """The norm of GPT-2's embedding is fused as well, and can't be another's."""
    return FUSED[name].form == "gpt2" and deletion == Deletion(0, "attention")


# What stays fused


@pytest.mark.parametrize("name", PRE_NORM)
def test_neighbours_stay_fused(name: str) -> None:
    model = tiny(name)
    before = operators(model)
    skip_norm = skip_norms(model)[0].op_type
    for subset in proper_subsets(all_deletions(model))[::3]:
        after = operators(prune_graph(model, subset)[0])
        first = any(first_of_gpt2(name, deletion) for deletion in subset)
        assert after[skip_norm] == before[skip_norm] - len(subset)
        assert after["Add"] == 0
        assert after["LayerNormalization"] == before["LayerNormalization"] + first
        assert after["SimplifiedLayerNormalization"] == before["SimplifiedLayerNormalization"]


def test_of_a_post_norm_sum_the_norm_stays(tmp_path: Path) -> None:
    """In a graph that is built of them, and where the runtime has fused the sums."""
    for model in (tiny("bert", layers=2), optimised(tiny("post_norm_encoder", layers=2), tmp_path)):
        plain = operators(model)["LayerNormalization"]
        for subset in proper_subsets(all_deletions(model)):
            after = operators(prune_graph(model, subset)[0])
            assert after["SkipLayerNormalization"] == 4 - len(subset)
            assert after["LayerNormalization"] == plain + len(subset)
            assert after["Add"] <= operators(model)["Add"]


@pytest.mark.parametrize("name", [name for name, spec in FUSED.items() if spec.bias])
def test_a_fused_bias_belongs_to_its_branch(name: str) -> None:
    model, plan = tiny(name, layers=2), [Deletion(0, "mlp")]
    changed = model.clone()
    bias = skip_norms(changed)[1].inputs[-1]
    assert bias is not None
    bias.const_value = ir.tensor(np.full(bias.shape, 3, np.float32), name=bias.name)  # type: ignore[arg-type]
    assert logits_apart(model, changed) > 0
    assert logits_apart(masked_model(model, plan), masked_model(changed, plan)) == 0
    assert logits_apart(prune_graph(model, plan)[0], prune_graph(changed, plan)[0]) == 0


def test_a_sum_before_a_plain_add_is_left_alone() -> None:
    """The next sum is not fused: no norm is left to fuse the one before it with."""
    model = tiny("genai_bias", layers=2)
    second = skip_norms(model)[1]
    branch, stream, weight, bias = second.inputs
    biased = ir.node("Add", [branch, bias])
    total = ir.node("Add", [stream, biased.outputs[0]], name=second.name)
    norm = ir.node("SimplifiedLayerNormalization", [total.outputs[0], weight], {"epsilon": 1e-5})
    model.graph.insert_before(second, [biased, total, norm])
    second.outputs[0].replace_all_uses_with(norm.outputs[0])
    second.outputs[3].replace_all_uses_with(total.outputs[0])
    model.graph.remove(second, safe=True)
    assert kinds(model) == usual(2)
    for subset in proper_subsets(all_deletions(model)):
        assert oracle_error(model, subset) <= TOLERANCE
    assert operators(prune_graph(model, [Deletion(0, "mlp")])[0])[SKIP] == 2


def test_rms_norms_are_standard_where_the_opset_has_them() -> None:
    model, plan = tiny("genai", layers=2), [Deletion(0, "attention")]
    assert operators(prune_graph(model, plan)[0])["SimplifiedLayerNormalization"] == 1
    model.graph.opset_imports[""] = 23
    assert operators(prune_graph(model, plan)[0])["RMSNormalization"] == 1
    assert oracle_error(model, plan) <= TOLERANCE


def test_a_weight_that_is_computed_too_late_leaves_the_sum_plain() -> None:
    model, plan = tiny("genai_bias", layers=2), [Deletion(0, "mlp")]
    second = skip_norms(model)[1]
    late = ir.node("Abs", [second.inputs[2]])  # type: ignore[list-item]
    model.graph.insert_before(second, late)
    second.replace_input_with(2, late.outputs[0])
    after = operators(prune_graph(model, plan)[0])
    assert (after[SKIP], after["Add"]) == (2, 2)
    assert oracle_error(model, plan) <= TOLERANCE


def test_a_branch_that_only_broadcasts_is_not_fused_with_the_norm() -> None:
    """Layer 0's MLP has a single position, which the sum with the attention broadcasts."""
    model = tiny("genai_parallel", layers=2)
    model.opset_imports[""] = min(model.opset_imports[""], 17)  # ReduceMean's axes as attribute
    (site,) = (site for site in sites_of(model) if site.ref == SublayerRef(0, "mlp"))
    mlp = value_of(model, site.branches[0])
    mean = ir.node("ReduceMean", [mlp], {"axes": [1], "keepdims": 1})
    mean.outputs[0].type, mean.outputs[0].shape = mlp.type, ir.Shape(["batch", 1, 32])
    put_behind(model, mlp, mean)
    value_of(model, site.skip).shape = ir.Shape(["batch", "seq", 32])
    cut, _ = prune_graph(model, [Deletion(0, "attention")])
    assert operators(cut)[SKIP] == operators(model)[SKIP] - 1
    assert oracle_error(model, [Deletion(0, "attention")]) < TOLERANCE


@pytest.mark.parametrize("name", ["genai", "genai_bias", "gpt2", "genai_layer_norm"])
def test_sums_that_are_all_public_keep_nodes_of_different_names(name: str) -> None:
    """Two public names stay apart by an Identity, which must not be called like the norm."""
    model = tiny(name, layers=2)
    for skip in dict.fromkeys(site.skip for site in sites_of(model)):
        value = value_of(model, skip)
        if not value.is_graph_output():
            publish(model, value, skip)
    for subset in proper_subsets(all_deletions(model)):
        pruned, _ = prune_graph(model, subset)
        names = Counter(node.name for node in pruned.graph)
        assert max(names.values()) == 1, subset
        assert oracle_error(model, subset) <= TOLERANCE
    assert "Identity" in operators(pruned)


def cache(*dims: int | str) -> ir.Value:
    return ir.Value(name="past", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(dims))


def test_a_head_size_that_is_not_declared_follows_from_the_reader() -> None:
    heads = {"num_heads": 4, "kv_num_heads": 2}
    packed, query = cache("batch", "seq", 4 * 16 + 2 * 2 * 16), cache("batch", "seq", 4 * 24)
    quantised = ir.node("QuantizeLinear", [packed, ir.Value(name="scale")])
    restored = ir.node("DequantizeLinear", [quantised.outputs[0], ir.Value(name="scale")])
    none = (None, None)
    for first, others, size in (
        (packed, none, 16), (query, (query, query), 24), (restored.outputs[0], none, 16)
    ):  # fmt: skip
        past = cache("batch", 2, "past", "kv_cache_dim")
        assert head_size(past) is None
        ir.node("GroupQueryAttention", [first, *others, past], heads, domain="com.microsoft")
        assert head_size(past) == size
    past = cache("batch", 2, "past", "kv_cache_dim")
    ir.node("Concat", [past, cache("batch", 2, "seq", 8)], {"axis": 2})
    assert head_size(past) == 8
    assert head_size(cache("batch", 2, "past", 4)) == 4


# Graphs as ONNX Runtime's own optimiser and quantiser make them

Make = Callable[[ir.Model, Path], ir.Model]


def optimised(model: ir.Model, folder: Path) -> ir.Model:
    """What ONNX Runtime saves after its own fusions."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    data = ir.to_proto(model).SerializeToString()
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return ir.load(folder / "optimised.onnx")


def dynamic(model: ir.Model, folder: Path) -> ir.Model:
    """Weights in int8, activations quantised as they come."""
    from onnxruntime.quantization import quantize_dynamic

    ir.save(model, folder / "source.onnx")
    quantize_dynamic(folder / "source.onnx", folder / "dynamic.onnx")
    return ir.load(folder / "dynamic.onnx")


def static(model: ir.Model, folder: Path) -> ir.Model:
    """int8 between QuantizeLinear and DequantizeLinear, all of it: caches and sums as well."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = iter(feeds(model)[:1])

        def get_next(self) -> Arrays | None:
            return next(self._feeds, None)

    ir.save(model, folder / "source.onnx")
    target = folder / "static.onnx"
    quantize_static(folder / "source.onnx", target, Reader(), quant_format=QuantFormat.QDQ)
    return ir.load(target)


def both(first: Make, second: Make) -> Make:
    return lambda model, folder: second(first(model, folder), folder)


MAKERS: dict[str, Make] = {
    "optimised": optimised,
    "dynamic": dynamic,
    "static": static,
    "dynamic_optimised": both(dynamic, optimised),
    "static_optimised": both(static, optimised),
    "optimised_dynamic": both(optimised, dynamic),
}
SIGNS = {
    "optimised": {"FusedMatMul"},
    "dynamic": {"MatMulInteger", "DynamicQuantizeLinear"},
    "static": {"QuantizeLinear", "DequantizeLinear"},
    "dynamic_optimised": {"DynamicQuantizeMatMul"},
    "static_optimised": {"QLinearMatMul", "QLinearSoftmax"},
    "optimised_dynamic": {"FusedMatMul", "MatMulInteger"},
}
HIDDEN = ("static_optimised", "parallel")
FORMS = ["pre_norm", "post_norm_encoder", "parallel"]
CASES = [(maker, form) for maker in MAKERS for form in FORMS if (maker, form) != HIDDEN]
CASES += [("dynamic", "router"), ("static", "sandwich")]


@pytest.mark.parametrize(("maker", "form"), CASES)
def test_subsets_equal_the_masked_original(maker: str, form: str, tmp_path: Path) -> None:
    model = MAKERS[maker](tiny(form, layers=2), tmp_path)
    assert SIGNS[maker] <= {node.op_type for node in model.graph}
    assert kinds(model) == usual(2)
    for subset in proper_subsets(all_deletions(model))[::2]:
        assert oracle_error(model, subset) <= TOLERANCE
    oracle, wrong = (
        masked_model(model, [Deletion(1, "mlp")]),
        prune_graph(model, [Deletion(0, "mlp")]),
    )
    assert logits_apart(oracle, wrong[0]) > 1e-2


def test_branches_that_a_quantised_sum_hides_are_refused(tmp_path: Path) -> None:
    check_refused(
        MAKERS[HIDDEN[0]](tiny(HIDDEN[1], layers=2), tmp_path), "fused-residual", field="QLinearAdd"
    )


@pytest.mark.parametrize("maker", ["dynamic", "static"])
def test_a_quantised_file_is_cut_and_its_weights_are_counted(maker: str, tmp_path: Path) -> None:
    plain = tiny("post_norm_encoder", layers=2)
    before = [site.parameters for site in sites_of(plain)]
    quantised = MAKERS[maker](plain, tmp_path)
    assert [site.parameters for site in sites_of(quantised)] == before
    assert graph_size(quantised).parameters == graph_size(plain).parameters
    save_model(MAKERS[maker](tiny("pre_norm", layers=2), tmp_path), tmp_path / "quantised.onnx")
    plan = [PlannedDeletion(layer=0, kind="attention"), PlannedDeletion(layer=1, kind="mlp")]
    report = prune_file(tmp_path / "quantised.onnx", tmp_path / "out" / "m.onnx", plan)
    assert report.verification.passed


@pytest.mark.parametrize("form", SPECS)
def test_every_form_is_found_after_the_runtimes_fusions(form: str, tmp_path: Path) -> None:
    assert kinds(optimised(tiny(form, layers=2), tmp_path)) == usual(2)
