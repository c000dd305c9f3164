"""Methods that look at a text: GPTQ, and int8 of activations; and dynamic int8, which doesn't."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter.artifacts.plans import noted_texts
from exporter.errors import CalibrationError, QuantizationError, UsageError
from exporter.models.texts.sources import read_texts
from exporter.quantize.calibration import calibration_beside
from exporter.quantize.quantize import quantize_file
from exporter.quantize.rewrite import round_to_nearest, scales_of_block
from exporter.quantize.settings import QuantizeSettings
from exporter.quantize.weight_only import gptq, inverse_factor
from graph_passes.files.storage import load_model
from tests.exporter.small_graphs import GEMM, ONLY_HEAD, TIED, WIDTH, set_weight, written
from tests.exporter.tiny_lm import write_tokenizer
from tests.raising import raises


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = written(TIED, tmp_path / "source" / "model.onnx")
    write_tokenizer(path.parent)
    return path


@pytest.fixture
def text(tmp_path: Path) -> str:
    words = np.random.default_rng(0).choice(["the", "value", "of", "list", "is", "type"], 2000)
    (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")
    return str(tmp_path / "text.txt")


def correlated(depth: int, rows: int = 1024) -> np.ndarray:  # type: ignore[type-arg]
    rng = np.random.default_rng(0)
    common = rng.standard_normal((rows, 8)) @ rng.standard_normal((8, depth))
    return common + 0.3 * rng.standard_normal((rows, depth))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
def test_gptq_is_nearer_to_the_product_than_rounding_and_farther_from_the_weight(
    symmetric: bool,
) -> None:
    depth = 40
    x = correlated(depth)
    weight = np.random.default_rng(1).standard_normal((depth, 24)).astype(np.float32)
    factor = inverse_factor(x.T @ x / len(x), "it")
    near = round_to_nearest(weight, 4, 16, symmetric=symmetric).values()[:, :depth].T
    found = gptq(weight, factor, 4, 16, symmetric=symmetric).values()[:, :depth].T
    assert error(x @ found, x @ weight) < 0.3 * error(x @ near, x @ weight)
    assert error(found, weight) > error(near, weight)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_blocks_scales_are_those_of_onnx_runtimes_kernel(bits: int, symmetric: bool) -> None:
    rows = np.random.default_rng(2).standard_normal((16, 40)).astype(np.float32)
    rows[:, 0], rows[:, 1], rows[:, 2] = 0, np.abs(rows[:, 1]), -np.abs(rows[:, 2])
    scales, zeros = scales_of_block(rows, bits, symmetric=symmetric)
    near = round_to_nearest(rows, bits, 16, symmetric=symmetric)
    np.testing.assert_array_equal(scales, near.scales[:, 0])
    np.testing.assert_array_equal(zeros, near.offsets[:, 0])


def test_the_factor_is_that_of_the_damped_moments_inverse() -> None:
    x = correlated(24)
    moments = (x.T @ x / len(x)).astype(np.float32)
    before = moments.copy()
    factor = inverse_factor(moments, "it").astype(np.float64)
    damped = moments + 0.01 * np.trace(moments) / 24 * np.eye(24)
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(24), atol=1e-4)
    np.testing.assert_array_equal(np.tril(factor, -1), 0)
    np.testing.assert_array_equal(moments, before)


def error(found: np.ndarray, wanted: np.ndarray) -> float:  # type: ignore[type-arg]
    return float(np.mean((found - wanted) ** 2))


def test_inputs_that_say_nothing_of_each_other_leave_gptq_at_rounding() -> None:
    weight = np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)
    found = gptq(weight, inverse_factor(np.eye(32), "it"), 4, 16, symmetric=False)
    near = round_to_nearest(weight, 4, 16, symmetric=False)
    np.testing.assert_array_equal(found.quants, near.quants)
    np.testing.assert_array_equal(found.scales, near.scales)


@pytest.mark.parametrize(
    ("moments", "code"),
    [
        (np.zeros((4, 4)), "input-zero"),
        (np.full((4, 4), np.nan), "not-finite"),
        (-np.ones((4, 4)) + 2 * np.eye(4), "singular-hessian"),
    ],
    ids=["zero", "nan", "indefinite"],
)
def test_moments_that_cant_be_inverted_are_refused_with_the_layer(
    moments: np.ndarray,  # type: ignore[type-arg]
    code: str,
) -> None:
    with raises(CalibrationError, code, "some_layer"):
        inverse_factor(moments, "some_layer")


def test_a_graph_is_quantised_by_a_text(model: Path, tmp_path: Path, text: str) -> None:
    settings = QuantizeSettings(
        method="gptq", head_bits=None, embedding_bits=None, calibration=(text,)
    )
    result = quantize_file(model, tmp_path / "out.onnx", settings)
    assert result.record.bits == {"4": 3}
    assert result.record.calibration is not None
    assert result.record.calibration.startswith(f"{text}, sha256 ")
    source = read_texts(text, part="calibration")
    noted = noted_texts(load_model(tmp_path / "out.onnx").metadata_props)
    known = {source.sha256, f"content:{source.content.written()}"}
    assert noted == {"quantised": sorted(known)}
    plain = quantize_file(
        model, tmp_path / "rtn.onnx", QuantizeSettings(head_bits=None, embedding_bits=None)
    )
    assert plain.record.calibration is None
    quants = [
        load_model(tmp_path / name).graph.initializers["down_Q4"].const_value.numpy()  # type: ignore[union-attr]
        for name in ("out.onnx", "rtn.onnx")
    ]
    assert not np.array_equal(*quants)


def test_gptq_watches_a_float16_graph(tmp_path: Path, text: str) -> None:
    half = written(TIED, tmp_path / "half" / "model.onnx", kind=ir.DataType.FLOAT16)
    write_tokenizer(half.parent)
    settings = QuantizeSettings(method="gptq", calibration=(text,))
    result = quantize_file(half, tmp_path / "out.onnx", settings)
    assert result.record.bits == {"4": 2, "8": 1}
    assert 0 < result.difference.max_abs_error < 0.2


def test_a_head_that_shares_the_table_is_rounded(model: Path, tmp_path: Path, text: str) -> None:
    settings = QuantizeSettings(method="gptq", calibration=(text,))
    quantize_file(model, tmp_path / "out.onnx", settings)
    quantize_file(model, tmp_path / "rtn.onnx", QuantizeSettings())
    tables = [
        load_model(tmp_path / name).graph.initializers["table_Q8"].const_value.numpy()  # type: ignore[union-attr]
        for name in ("out.onnx", "rtn.onnx")
    ]
    np.testing.assert_array_equal(*tables)


def test_a_layer_that_only_sees_zeros_is_named(model: Path, tmp_path: Path, text: str) -> None:
    dead = set_weight(model, "up", np.zeros((WIDTH, 96), np.float32), model.with_name("dead.onnx"))
    settings = QuantizeSettings(method="gptq", calibration=(text,))
    with raises(CalibrationError, "input-zero", "down_node"):
        quantize_file(dead, tmp_path / "out" / "out.onnx", settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-qdq"])
def test_onnx_runtimes_own_quantisers_keep_the_notes_and_tell_what_they_leave(
    model: Path, tmp_path: Path, text: str, scheme: str
) -> None:
    settings = QuantizeSettings(
        scheme=scheme,  # type: ignore[arg-type]
        calibration=(text,) if scheme == "int8-qdq" else (),
    )
    result = quantize_file(model, tmp_path / "out.onnx", settings)
    assert result.record.bits == {"8": 2}
    assert list(result.in_float) == ["head_node"]
    assert "table" in result.in_float["head_node"]
    assert (result.record.calibration is None) == (scheme == "int8-dynamic")
    assert 0 < result.difference.max_abs_error < 0.2
    operator = {"int8-dynamic": "MatMulInteger", "int8-qdq": "DequantizeLinear"}[scheme]
    graph = load_model(tmp_path / "out.onnx").graph
    assert operator in {node.op_type for node in graph}


@pytest.mark.parametrize(
    ("kind", "weight", "code", "field"),
    [
        (ir.DataType.BFLOAT16, None, "wrong-dtype", "not in BFLOAT16"),
        (ir.DataType.FLOAT16, None, "wrong-dtype", "not in FLOAT16"),
        (ir.DataType.FLOAT, np.nan, "not-finite", "up_node"),
    ],
)
def test_what_dynamic_int8_cant_quantise_is_refused(
    tmp_path: Path, kind: ir.DataType, weight: float | None, code: str, field: str
) -> None:
    source = written(TIED, tmp_path / "model.onnx", kind=kind)
    if weight is not None:
        numbers = np.full((WIDTH, 96), weight, np.float32)
        source = set_weight(source, "up", numbers, tmp_path / "other.onnx")
    settings = QuantizeSettings(scheme="int8-dynamic")
    with raises(QuantizationError, code, field):
        quantize_file(source, tmp_path / "out" / "out.onnx", settings)
    assert not (tmp_path / "out").exists()


def test_a_quantiser_that_leaves_everything_in_float_has_failed(tmp_path: Path) -> None:
    source = written(ONLY_HEAD, tmp_path / "model.onnx")
    with raises(QuantizationError, "nothing-to-quantize", "head_node"):
        quantize_file(source, tmp_path / "out.onnx", QuantizeSettings(scheme="int8-dynamic"))


def test_the_calibration_text_is_never_written_over(model: Path, text: str) -> None:
    before = Path(text).read_bytes()
    settings = QuantizeSettings(method="gptq", calibration=(text,))
    with raises(UsageError, "overwrites-input"):
        quantize_file(model, Path(text), settings)
    assert Path(text).read_bytes() == before


def test_int8_of_a_text_leaves_results_in_float(model: Path, tmp_path: Path, text: str) -> None:
    settings = QuantizeSettings(scheme="int8-qdq", calibration=(text,))
    quantize_file(model, tmp_path / "out.onnx", settings)
    graph = load_model(tmp_path / "out.onnx").graph
    sources = [n.inputs[0].producer() for n in graph if n.op_type == "QuantizeLinear"]  # type: ignore[union-attr]
    assert sources
    assert "MatMul" not in {source.op_type for source in sources if source is not None}


def test_dynamic_int8_takes_gemms(tmp_path: Path) -> None:
    source = written(GEMM, tmp_path / "model.onnx")
    result = quantize_file(source, tmp_path / "out.onnx", QuantizeSettings(scheme="int8-dynamic"))
    assert (result.record.bits, result.in_float) == ({"8": 1}, {})


def test_a_text_that_is_too_short_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the value of", encoding="utf-8")
    settings = QuantizeSettings(method="gptq", calibration=(str(tmp_path / "short.txt"),))
    with raises(CalibrationError, "text-too-short", 512):
        quantize_file(model, tmp_path / "out.onnx", settings)


def test_a_model_without_a_tokenizer_is_refused(model: Path, tmp_path: Path, text: str) -> None:
    model.with_name("tokenizer.json").unlink()
    settings = QuantizeSettings(method="gptq", calibration=(text,))
    with raises(CalibrationError, "no-tokenizer"):
        quantize_file(model, tmp_path / "out.onnx", settings)


def test_a_mixture_has_alike_much_of_each_text(model: Path, tmp_path: Path, text: str) -> None:
    other = tmp_path / "other.txt"
    other.write_text(Path(text).read_text() + " type")
    mixture = calibration_beside(model, (text, str(other)))
    assert [ref.samples for ref in mixture.parts] == [len(mixture.input_ids) // 2] * 2
    assert calibration_beside(model, (text,)).ref.mixture == []
    with raises(CalibrationError, "named-twice", text):
        calibration_beside(model, (text, text))
