"""A model whose weights stay in their shards is exported as if it were in memory."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.cut.surgery import prune_file
from exporter.errors import ExportError, ModelSourceError
from exporter.export.onnx_output import save_onnx
from exporter.files import sha256_file
from exporter.models.loading.meta_model import MetaModel, filled_while_running, load_meta
from exporter.models.loading.model_class import quiet_transformers
from exporter.models.loading.model_source import load_model
from exporter.progress import Quiet
from tests.raising import raises
from tests.reading import data_of
from tests.tiny_models import check_export, export_onnx, family_loaded, hook_count, tiny_model

pytestmark = pytest.mark.torch


Export = Callable[..., Path]


@pytest.fixture(scope="module")
def export(exports_once: None, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports a family at an opset, once for the module."""
    done: dict[Any, Path] = {}

    def exported(family: str, opset: int = 20) -> Path:
        if (family, opset) not in done:
            folder = tmp_path_factory.mktemp(f"{family}-{opset}")
            done[family, opset] = export_onnx(family_loaded(family), folder, opset=opset)
        return done[family, opset]

    return exported


def shapes(values: list[ir.Value]) -> dict[str, list[int | str]]:
    return {v.name: [d if isinstance(d, int) else str(d) for d in v.shape] for v in values}


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(path).graph)


class Listener(Quiet):
    def __init__(self) -> None:
        self.details: list[str] = []

    def detail(self, message: str) -> None:
        self.details.append(message)


def test_inputs_have_optimums_names_and_share_readable_dims(export: Export) -> None:
    inputs = shapes(ir.load(export("llama")).graph.inputs)
    assert list(inputs)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch", "sequence"]
    assert inputs["attention_mask"] == ["batch", "total_sequence"]
    caches = [f"past_key_values.{n}.{part}" for n in range(2) for part in ("key", "value")]
    assert list(inputs)[3:] == caches
    assert all(inputs[name] == ["batch", 2, "past_sequence", 24] for name in caches)


def test_outputs_are_logits_and_the_grown_cache(export: Export) -> None:
    outputs = shapes(ir.load(export("llama")).graph.outputs)
    caches = [f"present.{n}.{part}" for n in range(2) for part in ("key", "value")]
    assert list(outputs) == ["logits", *caches]
    assert outputs["logits"] == ["batch", "sequence", 128]
    for name in caches:
        batch, heads, length, size = outputs[name]
        assert (batch, heads, size) == ("batch", 2, 24)
        assert "past_sequence" in str(length)
        assert "sequence" in str(length).replace("past_sequence", "")


def test_an_encoder_has_no_cache_and_takes_token_types(export: Export) -> None:
    graph = ir.load(export("bert")).graph
    names = [value.name for value in graph.inputs]
    assert names == ["input_ids", "attention_mask", "token_type_ids"]
    assert shapes(graph.outputs) == {"last_hidden_state": ["batch", "sequence", 96]}


def test_weights_carry_pytorchs_names(export: Export) -> None:
    weights = ir.load(export("llama")).graph.initializers
    parameters = dict(family_loaded("llama").model.named_parameters())
    assert "model.embed_tokens.weight" in weights
    for name, parameter in parameters.items():
        transposed = weights.get(f"{name}_transposed")
        if transposed is not None:
            assert (transposed.const_value.numpy() == parameter.numpy().T).all()
    result = {name.removesuffix("_transposed") for name in weights} & set(parameters)
    assert {name for name in parameters if "proj" in name} <= result


def test_the_graph_keeps_scopes_and_no_paths(export: Export) -> None:
    content = export("llama").read_bytes()
    assert b"pkg.torch.onnx.name_scopes" in content
    for trace in (b".py", b"site-packages", b"stack_trace", str(Path.home()).encode() + b"/"):
        assert trace not in content


def test_opset_20_is_plain_and_23_has_the_fused_operators(export: Export) -> None:
    plain, fused = operators(export("llama", 20)), operators(export("llama", 23))
    assert plain["Attention"] == plain["RMSNormalization"] == plain["RotaryEmbedding"] == 0
    assert (fused["Attention"], fused["RMSNormalization"], fused["RotaryEmbedding"]) == (2, 5, 4)
    assert (fused["Cos"], fused["Sin"]) == (1, 1)
    assert fused.total() < plain.total()


def test_the_same_model_gives_the_same_files_and_nothing_is_printed(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    loaded, listener = family_loaded("llama", num_hidden_layers=1), Listener()
    # A file's exports may share traces; here each is made anew.
    monkeypatch.setattr(torch.onnx, "export", getattr(torch.onnx.export, "real", torch.onnx.export))
    first = export_onnx(loaded, tmp_path / "first")
    # The table of operators is made anew here: its making is what PyTorch talks about.
    made = ONNXRegistry.from_torchlib
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", getattr(made, "__wrapped__", made))
    capfd.readouterr()
    recwarn.clear()
    again = export_onnx(loaded, tmp_path / "again", progress=listener)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    # Libraries talk in details.
    assert any("nodes, opset 20" in line for line in listener.details)
    assert len(listener.details) > 1
    assert sha256_file(first) == sha256_file(again)
    assert data_of(first).name == data_of(again).name
    assert sha256_file(data_of(first)) == sha256_file(data_of(again))


@pytest.mark.parametrize("opset", [17, 25])
def test_an_opset_out_of_range_is_refused_before_any_work(tmp_path: Path, opset: int) -> None:
    with raises(ExportError, "opset-out-of-range", opset) as caught:
        export_onnx(family_loaded("llama"), tmp_path / "new", opset=opset)
    assert "18 to 24" in caught.value.hint
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("family", "code"), [("t5", "encoder-decoder"), ("mamba", "no-plain-cache")]
)
def test_a_model_with_other_states_is_refused(tmp_path: Path, family: str, code: str) -> None:
    with raises(ExportError, code):
        export_onnx(family_loaded(family), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_pytorch_cannot_trace_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("a long account\nof it") from ValueError("first line\nsecond line")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with raises(ExportError, "exporter-failed", "LlamaForCausalLM", 20, "first line") as caught:
        export_onnx(family_loaded("llama"), tmp_path)
    assert "\n" not in caught.value.message
    assert caught.value.__cause__ is not None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["interface", "export"])
def test_memory_that_runs_out_is_not_the_models_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    import torch

    loaded = family_loaded("llama")
    refused = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TB")

    def exhausted(*_: Any, **__: Any) -> None:
        raise refused

    if where == "interface":
        monkeypatch.setattr(loaded.model, "forward", exhausted)
    else:
        monkeypatch.setattr(torch.onnx, "export", exhausted)
    with pytest.raises(MemoryError, match="1 TB"):
        export_onnx(loaded, tmp_path)


# Ties, norms of one plus the weight, fused experts that several tensors become, turned weights.
FAMILIES = (
    ("gemma3_text", 23, "float32"),
    pytest.param("mixtral", 20, "bfloat16", marks=pytest.mark.long),
)


def saved(folder: Path, family: str) -> Path:
    model = tiny_model(family, num_hidden_layers=1, vocab_size=512)
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size="30KB")
    return folder


def both_files(loaded: Any, folder: Path, opset: int = 20, **options: Any) -> tuple[bytes, bytes]:
    path = export_onnx(loaded, folder, opset=opset, **options)
    return path.read_bytes(), data_of(path).read_bytes()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def graph(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    both_files(load_meta(str(llama)), folder)
    return folder / "model.onnx"


@pytest.mark.parametrize(("family", "opset", "dtype"), FAMILIES)
def test_the_files_are_those_of_the_model_in_memory(
    tmp_path: Path, family: str, opset: int, dtype: str
) -> None:
    source = str(saved(tmp_path / "model", family))
    meta = load_meta(source, dtype=dtype)
    streamed = both_files(meta, tmp_path / "streamed", opset)
    assert streamed == both_files(load_model(source, dtype=dtype), tmp_path / "whole", opset)
    assert all(parameter.is_meta for parameter in meta.model.parameters())
    parameters = {id(p): p.numel() for p in meta.model.parameters()}
    assert meta.shards.bytes_read <= 4 * 1.1 * sum(parameters.values())


def test_a_graph_is_held_against_the_model_a_module_at_a_time(llama: Path, graph: Path) -> None:
    meta = load_meta(str(llama))
    checks = check_export(meta, graph)
    assert [check.phase for check in checks] == ["prefill", "prefill", "decode", "decode"]
    assert meta.shards.bytes_read == 2 * sum(p.nbytes for p in meta.model.parameters())
    assert all(parameter.is_meta for parameter in meta.model.parameters())
    assert hook_count(meta.model) == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_interface_of_experts_without_weights_is_theirs(tmp_path: Path, dtype: str) -> None:
    from exporter.export.torch_export import interface_without_weights
    from exporter.models.onnx_interface import interface_of

    source = str(saved(tmp_path / "model", "mixtral"))
    meta, whole = (load(source, dtype=dtype).model for load in (load_meta, load_model))
    before = meta.get_experts_implementation()
    assert interface_without_weights(meta) == interface_of(whole)
    assert meta.get_experts_implementation() == before


@pytest.mark.parametrize("family", ["gpt_oss", "llama"])  # weights beside modules with weights
def test_weights_can_be_widened_on_the_way(tmp_path: Path, family: str) -> None:
    import torch

    source = str(saved(tmp_path / "model", family))
    meta, whole = (load(source, dtype="bfloat16") for load in (load_meta, load_model))
    tokens = torch.arange(8)[None]
    for parameter in meta.model.parameters():
        parameter.data = parameter.data.float()
    with torch.inference_mode(), filled_while_running(meta):
        logits = meta.model(tokens).logits
    with torch.inference_mode():
        expected = whole.model.float()(tokens).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)
    assert all(parameter.is_meta for parameter in meta.model.parameters())


def test_a_wrong_graph_is_found_out(llama: Path, graph: Path, tmp_path: Path) -> None:
    shutil.copytree(graph.parent, tmp_path, dirs_exist_ok=True)
    data = data_of(tmp_path / "model.onnx")
    weight = max(
        (v.const_value for v in ir.load(graph).graph.initializers.values() if v.const_value),
        key=lambda tensor: tensor.nbytes,
    )
    with data.open("r+b") as file:
        file.seek(getattr(weight, "offset", 0) or 0)
        file.write(b"\x00" * weight.nbytes)
    with raises(ExportError, "wrong-results"):
        check_export(load_meta(str(llama)), tmp_path / graph.name)


def test_a_cut_graph_is_held_against_the_same_cut(llama: Path, graph: Path, tmp_path: Path) -> None:
    cut = [PlannedDeletion(layer=0, kind="mlp", replacement="none")]
    prune_file(graph, tmp_path / "cut.onnx", cut)
    meta = load_meta(str(llama))
    assert all(check.passed for check in check_export(meta, tmp_path / "cut.onnx", deletions=cut))
    other = [PlannedDeletion(layer=0, kind="block", replacement="none")]
    with raises(ExportError, "other-outputs"):
        check_export(meta, graph, deletions=other)


def only_weights(meta: MetaModel) -> ir.Model:
    """A graph that was traced without a model's weights, as far as those go."""
    from exporter.export.torch_export import fake_parameters, read_weights_lazily

    made = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 20]> g (float x) => (y) { y = Neg(x) }'
    )
    with fake_parameters(meta.model):
        for name, parameter in meta.model.named_parameters():
            tensor = ir.tensor_adapters.TorchTensor(parameter.data, f"model.{name}")
            made.graph.register_initializer(ir.Value(name=tensor.name, const_value=tensor))
    read_weights_lazily(made.graph, meta, "model.")
    return made


def test_a_disk_without_room_is_told_before_anything_is_read(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    meta = load_meta(str(llama))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        save_onnx(only_weights(meta), tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert meta.shards.bytes_read == 0
    assert not list((tmp_path / "out").iterdir())


def test_a_shard_that_became_shorter_is_named_and_nothing_is_left(
    llama: Path, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(llama, source)
    meta = load_meta(str(source))
    shard = sorted(source.glob("*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size - 8)
    with raises(ModelSourceError, "unreadable", shard.name):
        save_onnx(only_weights(meta), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_weight_that_is_no_parameter_is_refused(llama: Path) -> None:
    from exporter.export.torch_export import fake_parameters, read_weights_lazily

    meta = load_meta(str(llama))
    made = only_weights(meta)
    with fake_parameters(meta.model):
        tensor = ir.tensor_adapters.TorchTensor(next(meta.model.parameters()).data, "odd")
        made.graph.register_initializer(ir.Value(name="odd", const_value=tensor))
    with raises(ExportError, "unknown-weight", "odd", "LlamaForCausalLM"):
        read_weights_lazily(made.graph, meta, "model.")
