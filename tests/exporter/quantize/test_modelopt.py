"""ModelOpt's quantisation in an environment of its own; here a program stands in for its Python."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.artifacts.comparison import QUANTIZATION_KEY, QuantizationRecord
from exporter.cli import run
from exporter.errors import MissingDependencyError, QuantizationError, UsageError
from exporter.quantize.quantize import quantize_file
from exporter.quantize.settings import QuantizeSettings
from graph_passes import save_model
from graph_passes.files.storage import load_model
from graph_passes.fusing.cache_in_place import CacheInPlacePass
from tests.graph_passes.decoder_graphs import decoder_model
from tests.raising import raises
from tests.reading import in_file, names_in
from tests.text_graphs import write_tokenizer

STAND_IN = """\
#!{python}
import sys
if sys.argv[1] == "-c":
    print("0.47.0")
    sys.exit(0)
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
assert sys.argv[1:3] == ["-m", "modelopt.onnx.quantization"], sys.argv
assert options["--calibration_eps"] == "cpu" and options["--high_precision_dtype"] == "fp32"
import numpy as np, onnx_ir as ir
given = np.load(options["--calibration_data_path"])
samples, length = given["input_ids"].shape
assert samples > 1 and given["attention_mask"].shape == (samples, length)
assert all(given[n].shape[0] == samples and given[n].shape[2] == 0 for n in given if "past" in n)
model = ir.load(options["--onnx_path"])
{action}
model.metadata_props.clear()
for node in model.graph:
    for value in node.outputs:
        if not value.is_graph_output():
            value.shape = None
ir.save(model, options["--output_path"])
open(options["--onnx_path"], "w").close()  # it may spoil what it was given
"""
QUANTISES = """\
for node in list(model.graph):
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    if weight is not None and weight.is_initializer():
        data = weight.const_value.numpy()
        scale = ir.val(weight.name + ".s", const_value=ir.tensor(np.float32(abs(data).max() / 127)))
        whole = np.round(data / scale.const_value.numpy()).astype(np.int8)
        small = ir.val(weight.name + ".q", const_value=ir.tensor(whole))
        model.graph.initializers.add(scale), model.graph.initializers.add(small)
        back = ir.node("DequantizeLinear", [small, scale])
        model.graph.insert_before(node, back)
        node.replace_input_with(1, back.outputs[0])
"""
FAILS = 'sys.exit("no kernel for TensorScatter")'


def stand_in(folder: Path, action: str) -> Path:
    program = folder / "python"
    program.write_text(STAND_IN.format(python=sys.executable, action=action))
    program.chmod(0o755)
    return program


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = decoder_model()
    model.metadata_props["depthcut.plan"] = "kept"
    save_model(model, tmp_path / "float" / "model.onnx")
    write_tokenizer(tmp_path / "float")
    (tmp_path / "float" / "config.json").write_text('{"max_position_embeddings": 16}')
    return tmp_path / "float" / "model.onnx"


@pytest.fixture
def settings(tmp_path: Path) -> QuantizeSettings:
    """As they are asked for; who runs it comes from :func:`stand_in`."""
    text = tmp_path / "text.txt"
    text.write_text("the a and of in to is for on with " * 8)  # the graph knows no more words
    return QuantizeSettings(
        "int4-awq", calibration=(str(text),), modelopt=stand_in(tmp_path, QUANTISES)
    )


def test_notes_and_shapes_are_put_back_and_the_source_stays(
    source: Path, settings: QuantizeSettings, tmp_path: Path
) -> None:
    before, out = source.read_bytes(), tmp_path / "out" / "model.onnx"
    record = quantize_file(source, out, settings).record
    assert source.read_bytes() == before
    assert (record.scheme, record.method) == ("int4-awq", "modelopt 0.47.0, awq_clip")
    assert (record.block_size, record.symmetric, record.embedding_bits) == (None, None, None)
    assert record.calibration is not None
    assert "text.txt, sha256 " in record.calibration
    model = load_model(out)
    assert record.bits == {"4": sum(n.op_type == "DequantizeLinear" for n in model.graph)}
    assert record.head_bits == 4
    note = model.metadata_props[QUANTIZATION_KEY]
    assert QuantizationRecord.model_validate_json(note) == record
    assert model.metadata_props["depthcut.plan"] == "kept"
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert attention.inputs[0] is not None
    assert attention.inputs[0].shape is not None
    assert {*names_in(out.parent)} <= {"model.onnx", "model.onnx.*.data"}


@pytest.mark.parametrize(
    ("action", "code", "field"),
    [(FAILS, "modelopt-failed", "no kernel"), ("", "nothing-to-quantize", "fp8")],
)
def test_what_fails_leaves_nothing(
    action: str,
    code: str,
    field: str,
    source: Path,
    settings: QuantizeSettings,
    tmp_path: Path,
) -> None:
    failing = replace(settings, scheme="fp8", modelopt=stand_in(tmp_path, action))
    with raises(QuantizationError, code, field):
        quantize_file(source, tmp_path / "out" / "model.onnx", failing)
    assert not list(tmp_path.glob("out/*"))


def test_caches_in_place_are_refused_before_it_runs(
    source: Path, settings: QuantizeSettings, tmp_path: Path
) -> None:
    model = load_model(source)
    CacheInPlacePass(32).call(model)
    save_model(model, source.with_name("fixed.onnx"))
    never = replace(settings, modelopt=tmp_path / "none")
    with raises(QuantizationError, "caches-in-place") as refused:
        quantize_file(source.with_name("fixed.onnx"), tmp_path / "o.onnx", never)
    assert "cache_length: 0" in (refused.value.hint or "")


def test_a_python_without_it_is_told(
    source: Path, settings: QuantizeSettings, tmp_path: Path
) -> None:
    out = tmp_path / "model.onnx"
    for python, code in (
        (tmp_path / "none", "python-missing"),
        (Path(sys.executable), "modelopt-missing"),
    ):
        with raises(MissingDependencyError, code, python) as missing:
            quantize_file(source, out, replace(settings, modelopt=python))
        assert "pip install 'nvidia-modelopt[onnx]'" in (missing.value.hint or "")
    with pytest.raises(UsageError):
        quantize_file(source, source, settings)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--quantize", "fp8"], "pip install 'nvidia-modelopt[onnx]'"),
        (["--quantize", "int4", "--modelopt-python", sys.executable], "--modelopt-python"),
        (["--quantize", "fp8", "--modelopt-python", sys.executable], "--calibration"),
        (
            ["--quantize", "int8-qdq", "--modelopt-python", sys.executable, "block_size: 64"],
            "block_size",
        ),
    ],
)
def test_options_that_do_not_fit(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    text = ["--calibration", "pydoc"] if "block_size: 64" in options else []
    call = ["quantize", str(source), "-o", str(tmp_path / "o.onnx"), *text]
    assert run([*call, *in_file(tmp_path, options)]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


def test_the_command_passes_int8_on_to_it_only_where_it_is_named(
    source: Path, settings: QuantizeSettings, tmp_path: Path
) -> None:
    result = ["quantize", str(source), "--quantize", "int8-qdq", "-q", "--calibration"]
    result.append(settings.calibration[0])
    named, plain = tmp_path / "named" / "m.onnx", tmp_path / "plain" / "m.onnx"
    assert run([*result, "-o", str(named), "--modelopt-python", str(settings.modelopt)]) == 0
    assert run([*result, "-o", str(plain)]) == 0
    notes = [load_model(path).metadata_props[QUANTIZATION_KEY] for path in (named, plain)]
    methods = [QuantizationRecord.model_validate_json(note).method for note in notes]
    assert methods == ["modelopt 0.47.0, max", "rtn"]
