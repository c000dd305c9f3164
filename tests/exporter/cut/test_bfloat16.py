"""Graphs in bfloat16 are verified and run in float32, since no CPU kernels take them; no less."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from test_verification import wrong_layer  # noqa: F401

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.latency import Shape
from exporter.artifacts.loaded_plan import LoadedPlan, Replacements
from exporter.compare.options import CompareOptions
from exporter.compare.session import compare
from exporter.cut import verify as oracle_setting
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.engines.decoding.generate import generate
from exporter.engines.decoding.runner_decoder import OnnxRuntimeDecoder
from exporter.engines.inputs import make_inputs, random_tokens
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.sessions import WidenedCopy, has_bfloat16, in_float32
from exporter.errors import BackendError, VerificationError
from exporter.report.sections.verdict import notices
from exporter.report.terminal import comparison_title
from graph_passes import ReplacementTensors, SublayerRef, testing
from graph_passes.files import storage
from graph_passes.files.storage import load_model, save_model
from tests.raising import raises
from tests.reading import data_of
from tests.tiny_graphs import TinySpec, tiny_model

CUT = [PlannedDeletion(layer=1, kind="attention"), PlannedDeletion(layer=2, kind="mlp")]
NARROW = ir.DataType.BFLOAT16


def in_bfloat16(model: ir.Model) -> ir.Model:
    """The model with bfloat16 in the place of float32, caches included."""
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for value in [*values, *(v for node in model.graph for v in node.outputs)]:
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(NARROW)
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
            array = value.const_value.numpy().astype(ml_dtypes.bfloat16)
            value.const_value = ir.tensor(array, name=value.name)
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes.get_int("to") == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", NARROW.value)
    return model


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storage, "_INLINE_BYTES", 32)  # tiny weights go to the data file too
    path = tmp_path / "model.onnx"
    save_model(in_bfloat16(tiny_model(TinySpec())), path)
    return path


@pytest.mark.parametrize("beside", [True, False])
def test_the_copy_stands_where_it_was_asked_for_and_goes(source: Path, beside: bool) -> None:
    with WidenedCopy(source, beside=beside) as copy:
        assert copy.is_file()
        assert (copy.parent.parent == source.parent) is beside
        place = copy.parent
    assert not place.exists()


@pytest.mark.parametrize("weights", ["compact", "share"])
@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_cut_is_verified(source: Path, weights: Literal["compact", "share"], limit: int) -> None:
    target = source.with_name("cut.onnx")
    verification = prune_file(
        source, target, CUT, CutOptions(weights=weights, verify_limit_bytes=limit)
    ).verification
    assert verification.passed
    assert "bfloat16 as float32" in verification.method
    assert verification.max_abs_error is not None
    assert verification.max_abs_error < 1e-5
    assert verification.tolerance is not None
    assert verification.tolerance < 5e-3  # a ten-thousandth of the logits, and not a twentieth
    inputs = {value.name: value.dtype for value in load_model(target).graph.inputs}
    assert inputs["past_key_values.0.key"] == NARROW


def test_a_wrong_cut_is_caught(source: Path, wrong_layer: None) -> None:  # noqa: F811
    with raises(VerificationError, "wrong-results"):
        prune_file(source, source.with_name("cut.onnx"), CUT[1:])


def replacements(seed: int) -> dict[SublayerRef, ReplacementTensors]:
    rng = np.random.default_rng(seed)
    bias, weight = rng.standard_normal(8), rng.standard_normal((8, 8)) / 3
    return {
        SublayerRef(1, "attention"): ReplacementTensors(bias, weight),
        SublayerRef(2, "mlp"): ReplacementTensors(bias),
    }


def test_replacements_are_verified(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to bfloat16 in the graph and not in the oracle, so it takes the wider tolerance."""
    monkeypatch.setattr(storage, "_MOST_INLINE_BYTES", 0)
    kinds = [("attention", 1, "linear"), ("mlp", 2, "bias")]
    plan = [PlannedDeletion(layer=n, kind=k, replacement=r) for k, n, r in kinds]  # type: ignore[arg-type]
    given = Replacements(source.with_name("numbers"), "0" * 64, replacements(0))
    target = source.with_name("cut.onnx")
    report = prune_file(source, target, LoadedPlan.of(plan, given), CutOptions(weights="share"))
    assert report.verification.passed
    assert report.verification.max_abs_error is not None
    assert 0 < report.verification.max_abs_error < 0.1
    assert data_of(target).stat().st_size > 0


def test_other_replacements_than_those_put_in_are_caught(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = testing.masked_model
    monkeypatch.setattr(testing, "masked_model", lambda m, d, _: right(m, d, replacements(1)))
    plan = [PlannedDeletion(layer=2, kind="mlp", replacement="bias")]
    ref = SublayerRef(2, "mlp")
    given = Replacements(source.with_name("numbers"), "0" * 64, {ref: replacements(0)[ref]})
    with raises(VerificationError, "wrong-results"):
        prune_file(source, source.with_name("cut.onnx"), LoadedPlan.of(plan, given))


def test_the_copy_in_float32_leaves_the_model_as_it_was(source: Path) -> None:
    model = load_model(source)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    wide = in_float32(model)
    assert has_bfloat16(model)
    assert not has_bfloat16(wide)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    for name, value in model.graph.initializers.items():
        tensor = wide.graph.initializers[name].const_value
        assert tensor is not None
        assert value.const_value is not None
        np.testing.assert_array_equal(
            tensor.numpy(), value.const_value.numpy().astype(tensor.dtype.numpy())
        )


def test_the_weights_count_in_float32_at_both_settings(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle_setting, "_OWN_BYTES", 0)
    model = load_model(source)
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value]
    total = sum(4 * tensor.size for tensor in weights if tensor.dtype == NARROW)
    assert oracle_setting._needed_by_the_thrifty(weights) > total
    assert oracle_setting._needed_in_full(weights) > 2 * total
    wide = source.with_name("wide.onnx")
    save_model(tiny_model(TinySpec()), wide)
    plain = [v.const_value for v in load_model(wide).graph.initializers.values() if v.const_value]
    assert oracle_setting._needed_by_the_thrifty(plain) < total


def feed(runner: OnnxRuntimeRunner) -> dict[str, Any]:
    shape = Shape("prefill", 2, 5)
    return make_inputs(runner.inputs, shape, random_tokens(shape, 11))


def test_the_runtime_runs_the_same_weights_in_float32_and_says_so(source: Path) -> None:
    wide = source.with_name("wide.onnx")
    save_model(in_float32(load_model(source)), wide)
    with OnnxRuntimeRunner(source, threads=1) as runner, OnnxRuntimeRunner(wide, threads=1) as want:
        assert (runner.capabilities.widened, want.capabilities.widened) == (True, False)
        assert {spec.dtype.name for spec in runner.outputs} == {"float32"}
        expected = want.run(feed(want))
        for name, array in runner.run(feed(runner)).items():
            np.testing.assert_array_equal(array, expected[name])


def test_the_copy_is_made_once_and_goes_with_its_runner(
    source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    runner = OnnxRuntimeRunner(source, threads=1)
    for _ in range(2):
        with runner:
            assert len(list(scratch.iterdir())) == 1
    del runner
    assert not list(scratch.iterdir())


def test_a_graph_that_lacks_another_kernel_is_an_error(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 20]>
        g (double[2] x) => (double[2] y) { y = Elu(x) }"""
    ir.save(ir.from_onnx_text(text), tmp_path / "m.onnx")
    with raises(BackendError, "load-failed", "Elu"):
        OnnxRuntimeRunner(tmp_path / "m.onnx", threads=1).__enter__()


def test_a_comparison_says_what_was_measured(source: Path) -> None:
    prune_file(source, source.with_name("cut.onnx"), CUT)
    options = CompareOptions(
        threads=1, prefill_lengths=(4,), decode_past_lengths=(), rounds=2, eval_tokens=32,
        eval_sequence_length=16,
    )  # fmt: skip
    report = compare(source, source.with_name("cut.onnx"), options)
    assert report.arms.baseline.precision == report.arms.candidate.precision == "bf16 as fp32"
    assert report.arms.baseline.file_bytes < 2 * source.stat().st_size + 4096
    assert report.accuracy is not None
    assert len(report.latency) == 1
    assert "Both arms are in bfloat16" in notices(report)[0]
    assert "bf16 as fp32" in comparison_title(report)


def test_a_comparison_in_float32_says_nothing_of_it(tmp_path: Path) -> None:
    save_model(tiny_model(TinySpec()), tmp_path / "wide.onnx")
    options = CompareOptions(
        threads=1, prefill_lengths=(4,), decode_past_lengths=(), rounds=2, eval_tokens=32,
        eval_sequence_length=16,
    )  # fmt: skip
    report = compare(tmp_path / "wide.onnx", tmp_path / "wide.onnx", options)
    assert report.arms.baseline.precision == "fp32"
    assert not any("bfloat16" in sentence for sentence in notices(report))


def test_a_text_is_continued(source: Path) -> None:
    wide = source.with_name("wide.onnx")
    save_model(in_float32(load_model(source)), wide)
    result = []
    for file in (source, wide):
        with OnnxRuntimeDecoder(file, threads=1) as decoder:
            result.append(generate(decoder, [3, 1, 4], new_tokens=6).token_ids)
    assert result[0] == result[1]
