"""ModelOpt's quantisation in an environment of its own; here a program stands in for its Python."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from exporter.artifacts.forms import QUANTIZATION_KEY, QuantizationRecord
from exporter.errors import MissingDependencyError, QuantizationError, UsageError
from exporter.quantization.modelopt import quantize_with_modelopt
from graph_passes import save_model
from graph_passes.files.storage import load_model
from tests.graph_passes.decoder_graphs import decoder_model

STAND_IN = """\
#!{python}
import sys
if sys.argv[1] == "-c":
    sys.exit(0)
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
assert sys.argv[1:3] == ["-m", "modelopt.onnx.quantization"], sys.argv
assert options["--calibration_eps"] == "cpu" and options["--high_precision_dtype"] == "fp32"
import numpy as np, onnx_ir as ir
assert np.load(options["--calibration_data_path"])["input_ids"].shape == (4, 8)
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
CALIBRATION = {"input_ids": np.zeros((4, 8), np.int64)}


def stand_in(folder: Path, action: str) -> Path:
    program = folder / "python"
    program.write_text(STAND_IN.format(python=sys.executable, action=action))
    program.chmod(0o755)
    return program


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = decoder_model()
    ShapeInferencePass()(model)
    model.metadata_props["depthcut.plan"] = "kept"
    save_model(model, tmp_path / "float" / "model.onnx")
    return tmp_path / "float" / "model.onnx"


def test_notes_and_shapes_are_put_back_and_the_source_stays(source: Path, tmp_path: Path) -> None:
    before, out = source.read_bytes(), tmp_path / "out" / "model.onnx"
    record = quantize_with_modelopt(
        source, out, "int4-awq", CALIBRATION, python=stand_in(tmp_path, QUANTISES),
        source_of_text="pydoc",
    )  # fmt: skip
    assert source.read_bytes() == before
    assert (record.method, record.calibration) == ("modelopt awq_clip", "pydoc")
    found = load_model(out)
    assert record.bits == {"4": sum(n.op_type == "DequantizeLinear" for n in found.graph)}
    note = found.metadata_props[QUANTIZATION_KEY]
    assert QuantizationRecord.model_validate_json(note) == record
    assert found.metadata_props["depthcut.plan"] == "kept"
    attention = next(node for node in found.graph if node.op_type == "Attention")
    assert attention.inputs[0] is not None
    assert attention.inputs[0].shape is not None
    assert {file.name for file in out.parent.iterdir()} <= {"model.onnx", "model.onnx.data"}


@pytest.mark.parametrize(
    ("action", "told"), [(FAILS, "no kernel for TensorScatter"), ("", "found nothing to quantise")]
)
def test_what_fails_leaves_nothing(action: str, told: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "model.onnx"
    with pytest.raises(QuantizationError, match=told):
        quantize_with_modelopt(source, out, "fp8", CALIBRATION, python=stand_in(tmp_path, action))
    assert not list(tmp_path.glob("out/*"))


def test_a_python_without_it_is_told(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    for python, told in (
        (tmp_path / "none", "There is no Python"),
        (Path(sys.executable), "has no ModelOpt"),
    ):
        with pytest.raises(MissingDependencyError, match=told):
            quantize_with_modelopt(source, out, "fp8", CALIBRATION, python=python)
    with pytest.raises(UsageError):
        quantize_with_modelopt(source, source, "fp8", CALIBRATION, python=Path(sys.executable))
