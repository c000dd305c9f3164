"""Graphs as ONNX Runtime's own optimiser and quantiser make them: found, and cut as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
import pytest
from graph_support import (
    SPECS,
    Arrays,
    all_deletions,
    check_tidy,
    feeds,
    largest_difference,
    oracle_error,
    proper_subsets,
    run,
    session,
    sites_of,
    smaller,
)

from exporter.artifacts import PlannedDeletion
from exporter.cut.surgery import prune_file
from graph_passes import Deletion, Refusal, SublayerRef, find_sites, prune_graph
from graph_passes.files.storage import save_model
from graph_passes.pipeline import graph_size
from graph_passes.testing import masked_model

EXPECTED = [SublayerRef(layer, kind) for layer in range(2) for kind in ("attention", "mlp")]
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
FORMS = ["pre_norm", "post_norm_encoder", "parallel"]
HIDDEN = ("static_optimised", "parallel")
CASES = [(maker, form) for maker in MAKERS for form in FORMS if (maker, form) != HIDDEN]
CASES += [("dynamic", "router"), ("static", "sandwich")]
SIGNS = {
    "optimised": {"FusedMatMul"},
    "dynamic": {"MatMulInteger", "DynamicQuantizeLinear"},
    "static": {"QuantizeLinear", "DequantizeLinear"},
    "dynamic_optimised": {"DynamicQuantizeMatMul"},
    "static_optimised": {"QLinearMatMul", "QLinearSoftmax"},
    "optimised_dynamic": {"FusedMatMul", "MatMulInteger"},
}


@pytest.mark.parametrize(("maker", "form"), CASES)
def test_subsets_equal_the_masked_original(maker: str, form: str, tmp_path: Path) -> None:
    model = MAKERS[maker](smaller(form), tmp_path)
    assert SIGNS[maker] <= {node.op_type for node in model.graph}
    assert [site.ref for site in sites_of(model)] == EXPECTED
    # A plain norm and a fused one round differently; the largest logit is about 10.
    for subset in proper_subsets(all_deletions(model))[::2]:
        assert oracle_error(model, subset) <= 1e-5
        check_tidy(prune_graph(model, subset)[0])


@pytest.mark.parametrize("maker", ["dynamic", "static"])
def test_a_quantised_file_is_cut_and_verified(maker: str, tmp_path: Path) -> None:
    save_model(MAKERS[maker](smaller("pre_norm"), tmp_path), tmp_path / "quantised.onnx")
    plan = [PlannedDeletion(layer=0, kind="attention"), PlannedDeletion(layer=1, kind="mlp")]
    report = prune_file(tmp_path / "quantised.onnx", tmp_path / "out" / "m.onnx", plan)
    assert report.verification.passed


def test_branches_that_a_quantised_sum_hides_are_refused(tmp_path: Path) -> None:
    (refusal,) = find_sites(MAKERS[HIDDEN[0]](smaller(HIDDEN[1]), tmp_path))
    assert isinstance(refusal, Refusal)
    assert (refusal.code, "QLinearAdd" in refusal.reason) == ("fused-residual", True)


@pytest.mark.parametrize("maker", MAKERS)
def test_the_oracle_catches_the_wrong_layer(maker: str, tmp_path: Path) -> None:
    model = MAKERS[maker](smaller("pre_norm"), tmp_path)
    expected = session(masked_model(model, [Deletion(1, "mlp")]), optimise=False)
    wrong = session(prune_graph(model, [Deletion(0, "mlp")])[0], optimise=False)
    for feed in feeds(model):
        want, have = run(expected, feed)["logits"], run(wrong, feed)["logits"]
        assert largest_difference({"logits": want}, {"logits": have}) > 1e-2


@pytest.mark.parametrize("maker", ["dynamic", "static"])
def test_quantised_weights_are_parameters_and_scales_are_none(maker: str, tmp_path: Path) -> None:
    plain, quantised = smaller("post_norm_encoder"), MAKERS[maker]
    before, packed = [site.parameters for site in sites_of(plain)], quantised(plain, tmp_path)
    assert [s.parameters for s in sites_of(packed)] == before
    assert graph_size(packed).parameters == graph_size(plain).parameters


@pytest.mark.parametrize(("operator", "counted"), [("DequantizeLinear", 8), ("Add", 0)])
def test_a_bias_of_32_bits_is_one_where_it_is_scaled(operator: str, counted: int) -> None:
    """Others of that type are shape arithmetic."""
    last = "y = DequantizeLinear(bias, scale)" if counted else "y = Add(bias, bias)"
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["": 20]>
        small () => ({"float" if counted else "int32"}[8] y)
        <int32[8] bias = {{1, 2, 3, 4, 5, 6, 7, 8}}, float scale = {{0.5}}> {{ {last} }}""")
    assert {node.op_type for node in model.graph} == {operator}
    assert graph_size(model).parameters == counted


def test_the_runtime_fuses_post_norm_sums_and_they_stay_fused(tmp_path: Path) -> None:
    model = optimised(smaller("post_norm_encoder"), tmp_path)
    before = Counter(node.op_type for node in model.graph)
    after = Counter(n.op_type for n in prune_graph(model, [Deletion(0, "mlp")])[0].graph)
    assert before["SkipLayerNormalization"] == 4
    assert after["SkipLayerNormalization"] == 3
    assert after["LayerNormalization"] == before["LayerNormalization"] + 1


@pytest.mark.parametrize("form", SPECS)
def test_every_form_is_found_after_the_runtimes_fusions(form: str, tmp_path: Path) -> None:
    assert [s.ref for s in sites_of(optimised(smaller(form), tmp_path))] == EXPECTED
