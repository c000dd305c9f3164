"""The check of a cut: right and wrong ones, with little memory, and in bfloat16 run as float32."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graph_passes
from exporter.artifacts import PlannedDeletion, PruneReport, Verification
from exporter.artifacts.latency import Shape
from exporter.artifacts.loaded_plan import LoadedPlan, Replacements
from exporter.compare.session import compare
from exporter.cut import verify as verifying
from exporter.cut.options import CutOptions
from exporter.cut.random_inputs import cases, draw, half_written
from exporter.cut.surgery import prune_file
from exporter.cut.verify import compare_run, judge, with_exact_products
from exporter.engines.decoding.generate import generate, open_decoder
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.sessions import has_bfloat16, in_float32
from exporter.engines.tensors import make_inputs, random_tokens
from exporter.errors import BackendError, TooLittleMemoryError, VerificationError
from exporter.report.sections.verdict import notices
from exporter.report.terminal import comparison_title
from graph_passes import ReplacementTensors, SublayerRef, testing
from graph_passes.files import storage
from graph_passes.files.storage import load_model
from tests import tiny_graphs
from tests.engine_support import SHORT
from tests.llama_shaped import LlamaShape, write_llama
from tests.raising import raises
from tests.reading import data_of
from tests.tiny_graphs import TinySpec, saved, tiny_model

CUT = [PlannedDeletion(layer=1, kind="attention")]
ENCODER = TinySpec(cache=False)


def prune(model: ir.Model, folder: Path, cut: list[PlannedDeletion] = CUT) -> Verification:
    return prune_file(saved(model, folder), folder / "o" / "m.onnx", cut).verification


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storage, "_INLINE_BYTES", 32)  # tiny weights go to the data file too
    return saved(tiny_model(), tmp_path / "source")


@pytest.fixture
def wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The surgery cuts the layer after the one that it reports."""
    right = graph_passes.prune_graph

    def wrong(model: ir.Model, value: Any, **options: Any) -> Any:
        _, report = right(model, value, **options)
        moved = [type(d)((d.layer + 1) % 3, d.kind) for d in value]
        return right(model, moved, **options)[0], report

    monkeypatch.setattr(graph_passes, "prune_graph", wrong)


def with_suppressed_token(value: float) -> ir.Model:
    """A model that adds ``value`` to the last token's logit, so that it is never chosen."""
    model = tiny_model(ENCODER)
    (raw,) = model.graph.outputs
    raw.name = "raw"
    suppression = np.array([0] * 10 + [value], np.float32)
    added = ir.Value(
        name="suppression",
        const_value=ir.tensor(suppression, name="suppression"),
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([11]),
    )
    model.graph.register_initializer(added)
    total = ir.node("Add", [raw, added], name="suppress")
    result = total.outputs[0]
    result.name, result.type, result.shape = "logits", raw.type, raw.shape
    model.graph.append(total)
    model.graph.outputs[0] = result
    return model


def with_scaled_branches(scale: float) -> ir.Model:
    """A model whose branches join the stream times ``scale``, as LayerScale does."""

    class Scaled(tiny_graphs._Builder):
        def _constant(self, data: Any) -> ir.Value:
            is_multiplier = isinstance(data, np.float32) and data == np.float32(0.22)
            return super()._constant(np.float32(scale) if is_multiplier else data)

    return Scaled(TinySpec(form="multiplier", cache=False), 0).build()


HARD = {
    "far below": lambda: with_suppressed_token(-1e9),
    "infinitely below": lambda: with_suppressed_token(-np.inf),
    "weak": lambda: with_scaled_branches(1e-3),
    "weaker": lambda: with_scaled_branches(1e-4),
}


@pytest.mark.parametrize("name", [*HARD, "plain"])
def test_suppressed_tokens_and_weak_branches_do_not_spoil_a_right_cut(
    name: str, tmp_path: Path
) -> None:
    model = HARD[name]() if name in HARD else with_scaled_branches(1.0)
    verification = prune(model, tmp_path)
    assert verification.passed is True
    assert verification.max_abs_error == pytest.approx(0.0, abs=1e-5)
    assert verification.tolerance is not None
    assert verification.tolerance < 1e-2


@pytest.mark.usefixtures("wrong_layer")
@pytest.mark.parametrize("name", HARD)
def test_nor_do_they_hide_a_wrong_one(name: str, tmp_path: Path) -> None:
    with raises(VerificationError, "wrong-results"):
        prune(HARD[name](), tmp_path)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("scale", [1e-9, 0.0])
def test_a_branch_that_changes_nothing_leaves_it_undecided(scale: float, tmp_path: Path) -> None:
    verification = prune(with_scaled_branches(scale), tmp_path)
    assert verification.passed is None
    assert "has no measurable effect" in verification.method
    assert verification.runs == 1


@pytest.mark.parametrize("more", [[], [PlannedDeletion(layer=2, kind="mlp")]])
def test_a_model_that_was_cut_before_can_be_verified(
    more: list[PlannedDeletion], tmp_path: Path
) -> None:
    prune(tiny_model(), tmp_path, CUT)
    again = prune_file(tmp_path / "o" / "m.onnx", tmp_path / "p" / "m.onnx", CUT + more)
    assert again.verification.passed is True
    assert len(again.deleted) == len(more)


def test_a_sequence_can_not_be_compared(tmp_path: Path) -> None:
    model = tiny_model()
    sequence = ir.node("SequenceConstruct", [model.graph.outputs[0]], name="collect")
    sequence.outputs[0].name = "all"
    sequence.outputs[0].type = ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))
    model.graph.append(sequence)
    model.graph.outputs.append(sequence.outputs[0])
    with raises(VerificationError, "not-numbers", "'all'"):
        prune(model, tmp_path)
    assert not (tmp_path / "o").exists()


INF, NAN = np.inf, np.nan


@pytest.mark.parametrize(("passes", "plain", "masked", "pruned", "dtype"), [
    (True, [1, 2], [3, 4], [3, 4.0001], "float32"),
    (False, [1, 2], [3, 4], [3, 4.001], "float32"),
    (False, [3, 4.001], [3, 4], [3, 4.0001], "float32"),  # within 1e-4, a tenth of the effect
    (True, [3, 4.001], [3, 4], [3, 4.00001], "float32"),
    (True, [1, 2], [3, 4], [3, 4.03], "float16"),
    (False, [1, 2], [3, 4], [3, 4.1], "float16"),
    (True, [1, -INF], [3, -INF], [3, -INF], "float32"),
    (False, [1, -INF], [3, -INF], [3, INF], "float32"),
    (False, [1, -INF], [3, -INF], [3, -5], "float32"),
    (False, [1, -INF], [3, -5], [3, -INF], "float32"),
    (True, [1, NAN], [3, NAN], [3, NAN], "float32"),
    (False, [1, 2], [3, NAN], [3, 4], "float32"),
    (False, [NAN, 1], [NAN, NAN], [NAN, NAN], "float32"),
    (True, [1, -1e9], [3, -1e9], [3, -1e9 - 64], "float32"),
    (False, [1, -1e9], [3, -1e9], [3, -2e9], "float32"),
    (True, [1, 2], [3, 4], [3, 4], "int64"),
    (False, [1, 2], [3, 4], [3, 5], "int64"),
    (False, [1, 2], [3, 4], [3], "float32"),
])  # fmt: skip
def test_what_counts_as_equal(
    passes: bool, plain: Any, masked: Any, pruned: Any, dtype: str
) -> None:
    arrays = [{"y": np.array(values, dtype)} for values in (plain, masked, pruned)]
    with nullcontext() if passes else pytest.raises(VerificationError):
        assert judge(compare_run("encode", *arrays), cut_anything=True).passed is True


def test_each_output_has_its_own_scale() -> None:
    plain, masked, pruned = (
        {"logits": np.float32([logit]), "present": np.float32([present])}
        for logit, present in ((9e5, 1.0), (8e5, 2.0), (8e5, 2.5))
    )
    judge(compare_run("prefill", plain, masked, masked), cut_anything=True)
    with raises(VerificationError, "wrong-results", "'present'"):
        judge(compare_run("prefill", plain, masked, pruned), cut_anything=True)


def test_packed_weights_are_multiplied_in_float32() -> None:
    """At level 4 inputs are quantised, and a last place that differs grows to a whole step."""
    node = ir.Node("com.microsoft", "MatMulNBits", [], [ir.AttrInt64("accuracy_level", 4)])
    plain = ir.Node("", "Add", [], [ir.AttrInt64("axis", 4)])
    graph = ir.Graph([], [], nodes=[node, plain], opset_imports={"": 20}, name="packed")
    given = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    seen = onnx.ModelProto.FromString(with_exact_products(given))
    assert [n.attribute[0].i for n in seen.graph.node] == [1, 4]
    assert with_exact_products(b"none") == b"none"


@pytest.mark.parametrize(("kept", "length"), [(1, 8), (0, 6)])
def test_a_cache_that_is_kept_to_a_window_gets_the_windows_room(kept: int, length: int) -> None:
    cache = ir.Value(
        name="past_key_values.0.key",
        shape=ir.Shape(["batch", 2, "past", 16]),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    attributes = [ir.AttrInt64("sliding_window_cache", kept), ir.AttrInt64("local_window_size", 8)]
    mask = ir.Value(name="attention_mask", type=ir.TensorType(ir.DataType.INT64))
    mask.shape = ir.Shape(["batch", "total"])
    operands = [None, None, None, cache, None, mask]
    node = ir.Node("com.microsoft", "GroupQueryAttention", operands, attributes)
    node.outputs[0].name = "present.0.key"
    graph = ir.Graph([cache, mask], node.outputs, nodes=[node], opset_imports={"": 20}, name="g")
    model = ir.Model(graph, ir_version=10)
    decode = next(case for case in cases(model) if case.name == "decode")
    drawn = draw(model, decode, np.random.default_rng(0))
    assert drawn["past_key_values.0.key"].shape == (2, 2, length, 16)
    assert drawn["attention_mask"].shape == (2, 7)
    assert drawn["attention_mask"].all() == bool(kept)  # such an attention takes no padding
    assert half_written(model) == ({"present.0.key"} if kept else set())


@pytest.mark.parametrize(
    ("name", "shape", "values"),
    [
        ("cache_position", [], 6),
        ("cache_position", ["batch", "seq"], [[6], [6]]),
        ("mystery", ["batch"], None),
    ],
)
def test_positions_go_on_after_the_past_and_what_has_no_type_can_not_be_drawn(
    name: str, shape: list[str], values: object
) -> None:
    """At a decoder's second step."""
    model = tiny_model(TinySpec())
    type_ = None if values is None else ir.TensorType(ir.DataType.INT64)
    model.graph.inputs.append(ir.Value(name=name, type=type_, shape=ir.Shape(shape)))
    decode = next(case for case in cases(model) if case.name == "decode")
    if values is None:
        with raises(VerificationError, "unknown-input", "'mystery'"):
            draw(model, decode, np.random.default_rng(0))
        return
    drawn = draw(model, decode, np.random.default_rng(0))[name]
    np.testing.assert_array_equal(drawn, np.array(values))


CHEAP = CutOptions(verify_limit_bytes=0)
GIGABYTE = 10**9


def _free(monkeypatch: pytest.MonkeyPatch, count: int | None) -> None:
    monkeypatch.setattr(verifying, "available_bytes", lambda: count)


@pytest.mark.parametrize("half", [False, True])
def test_above_the_limit_the_cheaper_setting_is_told(
    half: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if half:
        sizes: Any = {"layers": 3, "hidden": 64, "heads": 4, "kv_heads": 2, "intermediate": 96}
        source = write_llama(tmp_path / "m.onnx", LlamaShape(**sizes, vocabulary=500), noise=0.2)
    else:
        source = request.getfixturevalue("source")
    target = tmp_path / "o" / "m.onnx"
    verification = prune_file(source, target, CUT, CHEAP).verification
    assert (verification.passed, verification.runs, verification.max_abs_error) == (True, 1, 0.0)
    assert "decode; cheaper setting" in verification.method
    assert "more than the limit of 0 MB" in verification.method
    assert PruneReport.read(target.with_name("prune.json")).verification == verification


@pytest.mark.usefixtures("wrong_layer")
def test_a_wrong_cut_is_caught_in_bfloat16_and_at_the_cheaper_setting(
    narrow: Path, tmp_path: Path
) -> None:
    encoder = saved(tiny_model(ENCODER), tmp_path, "encoder.onnx")
    for source, plan, options in ((encoder, CUT, CHEAP), (narrow, TWO[1:], CutOptions())):
        with raises(VerificationError, "wrong-results"):
            prune_file(source, tmp_path / "o" / "m.onnx", plan, options)
    assert not (tmp_path / "o").exists()


def test_too_little_memory_is_told_before_a_check_runs(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "o" / "m.onnx"
    _free(monkeypatch, 10_000_000)
    with raises(TooLittleMemoryError, "", "--verify none"):
        prune_file(source, target, CUT)
    assert not (tmp_path / "o").exists()
    assert prune_file(source, target, CUT, CutOptions(verify="none"))
    _free(monkeypatch, (256 << 20) + 4000)
    verification = prune_file(source, target, CUT).verification
    assert verification.passed is True
    assert "of memory, 268 MB are free" in verification.method
    _free(monkeypatch, None)
    model = load_model(source)
    assert not verifying.thrifty_because(model, GIGABYTE)
    assert verifying.thrifty_because(model, 0)


def test_half_precision_takes_twice_its_size_and_a_file_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = LlamaShape(layers=4)
    try:
        model = load_model(write_llama(tmp_path / "model.onnx", shape))
    except OSError as error:
        pytest.skip(f"no sparse files here: {error}")
    total = sum(value.const_value.nbytes for value in model.graph.initializers.values())  # type: ignore[union-attr]
    _free(monkeypatch, 2 * total)
    assert verifying.thrifty_because(model, 10 * total)
    _free(monkeypatch, 3 * total)
    assert not verifying.thrifty_because(model, 10 * total)
    _free(monkeypatch, 3 * GIGABYTE)  # the embedding in fp32, twice, is 2.1 GB
    assert verifying.thrifty_because(model, 0)
    _free(monkeypatch, 2 * GIGABYTE)
    with raises(TooLittleMemoryError):
        verifying.thrifty_because(model, 0)


_WATCHED = """
import sys, threading, time
from pathlib import Path
import onnxruntime
from exporter.artifacts import PlannedDeletion
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

def watch():
    while not done:
        peaks.append(own())
        time.sleep(0.001)

source, target, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
done, peaks = False, [own()]
watcher = threading.Thread(target=watch)
watcher.start()
cut = [PlannedDeletion(layer=1, kind="attention")]
passed = prune_file(source, target, cut, CutOptions(verify_limit_bytes=limit)).verification.passed
done = True
watcher.join()
print(passed, max(peaks) - peaks[0])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's counts")
def test_the_cheaper_setting_keeps_weights_out_of_memory(tmp_path: Path) -> None:
    """Counts memory that isn't a file's: what a model larger than the memory could not have."""
    shape = LlamaShape(
        layers=2, hidden=1024, heads=8, kv_heads=8, intermediate=2048, vocabulary=1000,
        dtype=ir.DataType.FLOAT,
    )  # fmt: skip
    source = write_llama(tmp_path / "model.onnx", shape, noise=0.02)
    size = source.with_name("model.onnx.data").stat().st_size
    assert size > 80e6
    taken = []
    for limit in (10 * size, 0):
        target = tmp_path / str(limit) / "m.onnx"
        command = [sys.executable, "-c", _WATCHED, str(source), str(target), str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        passed, peak = done.stdout.split()
        assert passed == "True"
        taken.append(int(peak))
    in_full, thrifty = taken
    assert in_full - thrifty > 0.6 * size
    assert thrifty < 0.7 * size  # what is imported on the way takes 45 MB


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
def narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storage, "_INLINE_BYTES", 32)  # tiny weights go to the data file too
    return saved(in_bfloat16(tiny_model(TinySpec())), tmp_path / "narrow")


TWO = [PlannedDeletion(layer=1, kind="attention"), PlannedDeletion(layer=2, kind="mlp")]


@pytest.mark.parametrize("weights", ["compact", "share"])
@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_cut_in_bfloat16_is_verified(narrow: Path, weights: Any, limit: int) -> None:
    target = narrow.with_name("cut.onnx")
    options = CutOptions(weights=weights, verify_limit_bytes=limit)
    verification = prune_file(narrow, target, TWO, options).verification
    assert verification.passed
    assert "bfloat16 as float32" in verification.method
    assert verification.max_abs_error is not None
    assert verification.max_abs_error < 1e-5
    assert verification.tolerance is not None
    assert verification.tolerance < 5e-3  # a ten-thousandth of the logits, and not a twentieth
    inputs = {value.name: value.dtype for value in load_model(target).graph.inputs}
    assert inputs["past_key_values.0.key"] == NARROW


def replacements(seed: int) -> dict[SublayerRef, ReplacementTensors]:
    rng = np.random.default_rng(seed)
    bias, weight = rng.standard_normal(8), rng.standard_normal((8, 8)) / 3
    return {
        SublayerRef(1, "attention"): ReplacementTensors(bias, weight),
        SublayerRef(2, "mlp"): ReplacementTensors(bias),
    }


@pytest.mark.parametrize("right", [True, False])
def test_replacements_in_bfloat16_are_verified(
    right: bool, narrow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded to bfloat16 in the graph and not in the oracle, so it takes the wider tolerance."""
    monkeypatch.setattr(storage, "_MOST_INLINE_BYTES", 0)
    kinds = [("attention", 1, "linear"), ("mlp", 2, "bias")]
    plan = [PlannedDeletion(layer=n, kind=k, replacement=r) for k, n, r in kinds]  # type: ignore[arg-type]
    given = Replacements(narrow.with_name("numbers"), "0" * 64, replacements(0))
    target, masked = narrow.with_name("cut.onnx"), testing.masked_model
    call = (narrow, target, LoadedPlan.of(plan, given), CutOptions(weights="share"))
    if not right:
        monkeypatch.setattr(testing, "masked_model", lambda m, d, _: masked(m, d, replacements(1)))
        with raises(VerificationError, "wrong-results"):
            prune_file(*call)
        return
    verification = prune_file(*call).verification
    assert verification.passed
    assert verification.max_abs_error is not None
    assert 0 < verification.max_abs_error < 0.1
    assert data_of(target).stat().st_size > 0


def test_the_copy_in_float32_leaves_the_model_as_it_was(narrow: Path) -> None:
    model = load_model(narrow)
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


def feed(runner: OnnxRuntimeRunner) -> dict[str, Any]:
    shape = Shape("prefill", 2, 5)
    return make_inputs(runner.inputs, shape, random_tokens(shape, 11))


def test_the_runtime_runs_the_same_weights_in_float32_and_says_so(narrow: Path) -> None:
    wide = saved(in_float32(load_model(narrow)), narrow.parent, "wide.onnx")
    with OnnxRuntimeRunner(narrow, threads=1) as runner, OnnxRuntimeRunner(wide, threads=1) as want:
        assert (runner.capabilities.widened, want.capabilities.widened) == (True, False)
        assert {spec.dtype.name for spec in runner.outputs} == {"float32"}
        expected = want.run(feed(want))
        for name, array in runner.run(feed(runner)).items():
            np.testing.assert_array_equal(array, expected[name])
    texts = []
    for file in (narrow, wide):
        with open_decoder(file, threads=1) as decoder:
            texts.append(generate(decoder, [3, 1, 4], new_tokens=6).token_ids)
    assert texts[0] == texts[1]


def test_a_graph_that_lacks_another_kernel_is_an_error(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 20]>
        g (double[2] x) => (double[2] y) { y = Elu(x) }"""
    ir.save(ir.from_onnx_text(text), tmp_path / "m.onnx")
    with raises(BackendError, "load-failed", "Elu"):
        OnnxRuntimeRunner(tmp_path / "m.onnx", threads=1).__enter__()


def test_a_comparison_says_what_was_measured(narrow: Path, tmp_path: Path) -> None:
    prune_file(narrow, narrow.with_name("cut.onnx"), TWO)
    report = compare(narrow, narrow.with_name("cut.onnx"), SHORT)
    assert report.arms.baseline.precision == report.arms.candidate.precision == "bf16 as fp32"
    assert report.arms.baseline.file_bytes < 2 * narrow.stat().st_size + 4096
    assert report.accuracy is not None
    assert len(report.latency) == 1
    assert "Both arms are in bfloat16" in notices(report)[0]
    assert "bf16 as fp32" in comparison_title(report)
    wide = saved(tiny_model(), tmp_path, "wide.onnx")
    report = compare(wide, wide, SHORT)
    assert report.arms.baseline.precision == "fp32"
    assert not any("bfloat16" in sentence for sentence in notices(report))
