"""What looks at a text: int8 of activations; and dynamic int8, which doesn't."""

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
from exporter.quantize.settings import QuantizeSettings
from graph_passes.files.storage import load_model
from tests.raising import raises
from tests.text_graphs import GEMM, ONLY_HEAD, TIED, WIDTH, set_weight, write_tokenizer, written


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


def by_text(text: str) -> QuantizeSettings:
    return QuantizeSettings(scheme="int8-qdq", calibration=(text,))


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
    with raises(UsageError, "overwrites-input"):
        quantize_file(model, Path(text), by_text(text))
    assert Path(text).read_bytes() == before


def test_int8_of_a_text_leaves_results_in_float_and_notes_the_text(
    model: Path, tmp_path: Path, text: str
) -> None:
    record = quantize_file(model, tmp_path / "out.onnx", by_text(text)).record
    assert str(record.calibration).startswith(f"{text}, sha256 ")
    source = read_texts(text, part="calibration")
    noted = noted_texts(load_model(tmp_path / "out.onnx").metadata_props)
    assert noted == {"quantised": sorted({source.sha256, f"content:{source.content.written()}"})}
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
    with raises(CalibrationError, "text-too-short", 512):
        quantize_file(model, tmp_path / "out.onnx", by_text(str(tmp_path / "short.txt")))


def test_a_model_without_a_tokenizer_is_refused(model: Path, tmp_path: Path, text: str) -> None:
    model.with_name("tokenizer.json").unlink()
    with raises(CalibrationError, "no-tokenizer"):
        quantize_file(model, tmp_path / "out.onnx", by_text(text))


def test_a_mixture_has_alike_much_of_each_text(model: Path, tmp_path: Path, text: str) -> None:
    other = tmp_path / "other.txt"
    other.write_text(Path(text).read_text() + " type")
    mixture = calibration_beside(model, (text, str(other)))
    assert [ref.samples for ref in mixture.parts] == [len(mixture.input_ids) // 2] * 2
    assert calibration_beside(model, (text,)).ref.mixture == []
    with raises(CalibrationError, "named-twice", text):
        calibration_beside(model, (text, text))
