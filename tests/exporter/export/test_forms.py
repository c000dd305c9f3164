"""What a target refuses before anything is done, and how a form is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import onnx_ir as ir
import pytest

from exporter.artifacts import FORM_KEY, FormRecord, Target
from exporter.cli import cli
from exporter.errors import UsageError
from exporter.export.forms.portable import WrittenForm, form_in_words, note_form
from exporter.export.forms.targets import TARGETS, refuse_options
from exporter.export.onnx_output import save_onnx
from tests.graph_passes.fused_graphs import FusedSpec, fused_model
from tests.raising import raises
from tests.reading import data_of

USUAL: dict[str, Any] = {
    "exporter": None, "opset": None, "dtype": "float32", "provider": "cpu", "engine": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("portable", {}),
        ("portable", {"exporter": "optimum", "opset": 18, "engine": "tensorrt-rtx"}),
        ("portable", {"dtype": "bfloat16", "provider": "cuda"}),
        ("onnxruntime-cpu", {}),
        ("onnxruntime-cuda", {"dtype": "float16", "provider": "cuda"}),
        ("tensorrt", {"engine": "tensorrt", "dtype": "float16"}),
        ("tensorrt-rtx", {"engine": "tensorrt-rtx"}),
    ],
)
def test_what_fits_is_taken(target: Target, changes: dict[str, Any]) -> None:
    refuse_options(target, **USUAL | changes)


@pytest.mark.parametrize(
    ("target", "changes", "code", "field"),
    [
        ("onnxruntime-cpu", {"exporter": "torch"}, "decided-by-target", "--exporter torch"),
        ("tensorrt", {"opset": 20}, "decided-by-target", "--opset 20"),
        ("onnxruntime-cpu", {"dtype": "float16"}, "no-form-in-dtype", "float16"),
        ("onnxruntime-cuda", {"provider": "cuda"}, "no-form-in-dtype", "float32"),
        ("onnxruntime-cuda", {"dtype": "float16"}, "other-provider", "--provider cuda"),
        ("onnxruntime-cpu", {"provider": "cuda"}, "other-provider", "--provider cpu"),
        ("onnxruntime-cpu", {"engine": "tensorrt"}, "other-engine", "tensorrt"),
        ("tensorrt", {"engine": "tensorrt-rtx"}, "other-engine", "tensorrt-rtx"),
    ],
)
def test_what_contradicts_a_target_is_refused(
    target: Target, changes: dict[str, Any], code: str, field: str
) -> None:
    with raises(UsageError, code, field) as error:
        refuse_options(target, **USUAL | changes)
    assert error.value.hint


def test_the_command_line_knows_every_target() -> None:
    export = cli.get_command(None, "export")
    option = next(param for param in export.params if param.name == "target")
    assert tuple(option.type.choices) == get_args(Target) == tuple(TARGETS)  # type: ignore[attr-defined]


def test_a_form_is_noted_in_the_graph(tmp_path: Path) -> None:
    save_onnx(fused_model(FusedSpec()), tmp_path)
    weights = data_of(tmp_path / "model.onnx").stat()
    written = WrittenForm("someone 1.0", passes=("a", "b"), remark="no faster one")
    record = note_form(tmp_path, written, "onnxruntime-cpu")
    model = ir.load(tmp_path / "model.onnx")
    assert FormRecord.model_validate_json(model.metadata_props[FORM_KEY]) == record
    assert record.fused["GroupQueryAttention"] == 2
    assert "MatMul" not in record.fused
    after = data_of(tmp_path / "model.onnx").stat()
    assert (after.st_ino, after.st_mtime_ns) == (weights.st_ino, weights.st_mtime_ns)
    text = form_in_words(record)
    assert "someone 1.0, then a, b" in text
    assert "2 GroupQueryAttention" in text
    assert text.endswith("no faster one")
    assert record.cache_room is None
    fixed = record.model_copy(update={"cache_room": 4096})
    assert "4096" in form_in_words(fixed)
    assert "4096" not in text
