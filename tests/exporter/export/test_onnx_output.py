from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.export import onnx_output
from exporter.export.onnx_output import save_onnx
from tests.reading import names_in


def model(value: float) -> ir.Model:
    text = '<ir_version: 10, opset_import: ["": 20]> g (float[128] x) => (y) { y = Add(x, w) }'
    made = ir.from_onnx_text(text.replace("float[128] x", "float[128] x, float[128] w"))
    weight = made.graph.inputs.pop()
    weight.const_value = ir.tensor(np.full(128, value, np.float32), name="w")
    made.graph.register_initializer(weight)
    return made


def stored(folder: Path) -> float:
    array = ir.load(folder / "model.onnx").graph.initializers["w"].const_value
    assert array is not None
    return float(array.numpy()[0])


def test_a_model_is_two_files_and_replaces_an_earlier_one(tmp_path: Path) -> None:
    assert save_onnx(model(1.0), tmp_path / "new") == tmp_path / "new" / "model.onnx"
    assert stored(tmp_path / "new") == 1.0
    save_onnx(model(2.0), tmp_path / "new")
    assert stored(tmp_path / "new") == 2.0
    assert names_in(tmp_path / "new") == ["model.onnx", "model.onnx.*.data"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failure_while_saving_leaves_the_earlier_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    save_onnx(model(1.0), tmp_path)

    def interrupted(model: ir.Model, stage: Path, name: str, *_: Any, **__: Any) -> None:
        (stage / name).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(onnx_output, "write_files", interrupted)
    with pytest.raises(type(failure)):
        save_onnx(model(2.0), tmp_path)
    assert names_in(tmp_path) == ["model.onnx", "model.onnx.*.data"]
    assert stored(tmp_path) == 1.0
