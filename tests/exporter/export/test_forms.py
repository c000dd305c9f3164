"""Forms for targets: what is refused before anything is done, and what is written where."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import pytest

from exporter.artifacts import FORM_KEY, FormRecord, Target
from exporter.cli import cli
from exporter.engines.decoding.generate import generate, open_decoder
from exporter.engines.runners.cache_form import read_cache_form
from exporter.errors import ExportError, MissingDependencyError, UsageError
from exporter.export import onnx_output
from exporter.export.forms.genai import require_windows, windowed_layers
from exporter.export.forms.portable import (
    WrittenForm,
    export_with_optimum,
    form_in_words,
    note_form,
)
from exporter.export.forms.targets import TARGETS, refuse_options, write_form
from exporter.export.forms.tensorrt import rewrite_decoder
from exporter.export.onnx_output import save_onnx
from exporter.models.loading.model_source import load_model
from graph_passes import save_model
from graph_passes.files.storage import load_model as load_graph
from tests.graph_passes.decoder_graphs import DecoderSpec, decoder_model
from tests.graph_passes.fused_graphs import FusedSpec, fused_model
from tests.raising import raises
from tests.reading import data_of, names_in
from tests.tiny_models import check_export

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
        ("onnxruntime-cpu", {"exporter": "torch"}, "options-clash", "exporter: torch"),
        ("tensorrt", {"opset": 20}, "options-clash", "opset: 20"),
        ("onnxruntime-cpu", {"dtype": "float16"}, "options-clash", "float16"),
        ("onnxruntime-cuda", {"provider": "cuda"}, "options-clash", "float32"),
        ("onnxruntime-cuda", {"dtype": "float16"}, "options-clash", "--provider cuda"),
        ("onnxruntime-cpu", {"provider": "cuda"}, "options-clash", "--provider cpu"),
        ("onnxruntime-cpu", {"engine": "tensorrt"}, "options-clash", "tensorrt"),
        ("tensorrt", {"engine": "tensorrt-rtx"}, "options-clash", "tensorrt-rtx"),
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


FULL, LOCAL = "full_attention", "sliding_attention"


def config(window: int | None, types: list[str] | None = None) -> Any:
    namespace = SimpleNamespace(
        sliding_window=window, max_position_embeddings=64, num_hidden_layers=2
    )
    if types is not None:
        namespace.layer_types = types
    return namespace


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (config(None), 0),
        (config(8), 2),
        (config(64), 0),
        (config(8, [LOCAL, FULL]), 1),
        (config(8, [FULL, FULL]), 0),
        (SimpleNamespace(num_hidden_layers=2), 0),
    ],
)
def test_the_config_tells_which_layers_have_one(config: Any, count: int) -> None:
    assert windowed_layers(config) == count


@pytest.mark.parametrize(("written", "serves"), [(0, False), (1, True), (2, False)])
def test_a_graph_with_more_or_fewer_is_refused(tmp_path: Path, written: int, serves: bool) -> None:
    model = fused_model(FusedSpec(layers=2))
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    for node in nodes[:written]:
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 8)
    save_model(model, tmp_path / "model.onnx")
    if serves:
        require_windows(tmp_path / "model.onnx", config(8, [LOCAL, FULL]))
        return
    with raises(ExportError, "wrong-windows", f"{written} of 2"):
        require_windows(tmp_path / "model.onnx", config(8, [LOCAL, FULL]))


PROMPT, NEW = [5, 9, 20, 33, 7, 11, 13], 6
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128,
    "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip


def checkpoint(folder: Path, family: str, **changes: Any) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def tensorrt_form(source: Path, folder: Path, **options: Any) -> tuple[Path, FormRecord]:
    loaded = load_model(str(source), dtype="float32")
    folder.mkdir()
    onnx, record = write_form(loaded, folder, target="tensorrt-rtx", **options)
    assert all(check.passed for check in check_export(loaded, onnx))
    assert FormRecord.model_validate_json(load_graph(onnx).metadata_props[FORM_KEY]) == record
    return onnx, record


@pytest.mark.torch
def test_caches_lie_in_place(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "llama", "llama")
    with raises(UsageError, "cache-too-short", 128, 129):
        tensorrt_form(source, tmp_path / "none", room=129)
    onnx, record = tensorrt_form(source, tmp_path / "out", room=100)
    assert record.passes == ["GroupedAttentionPass", "CacheInPlacePass(128)"]
    assert record.fused == {
        "Attention": 1, "RMSNormalization": 3, "RotaryEmbedding": 2, "TensorScatter": 2,
    }  # fmt: skip
    assert (record.cache_room, record.remark) == (128, None)
    assert read_cache_form(onnx).buffer == 128
    with open_decoder(onnx, threads=1) as decoder:
        assert len(generate(decoder, PROMPT, new_tokens=NEW).token_ids) == NEW


@pytest.mark.parametrize(
    ("spec", "room", "passes", "remark"),
    [
        (DecoderSpec(), 32, ("GroupedAttentionPass", "CacheInPlacePass(32)"), None),
        (DecoderSpec(), None, ("GroupedAttentionPass",), None),
        (DecoderSpec(mask="all"), 32, ("GroupedAttentionPass",), "window and padding alone, so"),
        (DecoderSpec(softcap=2.0), 32, (), "bounds its scores, so its caches grow"),
    ],
)
def test_what_can_not_be_rewritten_is_told(
    spec: DecoderSpec, room: int | None, passes: tuple[str, ...], remark: str | None
) -> None:
    model, done, result = rewrite_decoder(decoder_model(spec), room)
    assert done == passes
    assert result == remark if remark is None else remark in str(result)
    assert any(node.op_type == "TensorScatter" for node in model.graph) == (len(passes) == 2)


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


def test_without_optimum_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    nothing: Any = None
    with pytest.raises(MissingDependencyError) as caught:
        export_with_optimum(nothing, tmp_path)
    assert "depthcut[optimum]" in caught.value.hint
