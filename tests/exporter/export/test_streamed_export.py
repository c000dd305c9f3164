"""A model whose weights stay in their shards is exported as if it were in memory."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.errors import ExportError, ModelSourceError
from exporter.export.onnx_output import save_onnx
from exporter.models.loading.meta_model import MetaModel, load_meta
from exporter.models.loading.model_class import quiet_transformers
from exporter.models.loading.model_source import load_model
from tests.raising import raises
from tests.reading import data_of
from tests.tiny_models import hook_count, tiny_model

pytestmark = pytest.mark.torch

# Ties, norms of one plus the weight, fused experts that several tensors become, turned weights.
FAMILIES = (("gemma3_text", 23, "float32"), ("mixtral", 20, "bfloat16"))


def saved(folder: Path, family: str) -> Path:
    model = tiny_model(family, num_hidden_layers=1, vocab_size=512)
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size="30KB")
    return folder


def exported(loaded: Any, folder: Path, opset: int = 20, **options: Any) -> tuple[bytes, bytes]:
    from exporter.export.torch_export import export_onnx

    path = export_onnx(loaded, folder, opset=opset, **options)
    return path.read_bytes(), data_of(path).read_bytes()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def graph(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    exported(load_meta(str(llama)), folder)
    return folder / "model.onnx"


@pytest.mark.parametrize(("family", "opset", "dtype"), FAMILIES)
def test_the_files_are_those_of_the_model_in_memory(
    tmp_path: Path, family: str, opset: int, dtype: str
) -> None:
    source = str(saved(tmp_path / "model", family))
    meta = load_meta(source, dtype=dtype)
    streamed = exported(meta, tmp_path / "streamed", opset)
    assert streamed == exported(load_model(source, dtype=dtype), tmp_path / "whole", opset)
    assert all(parameter.is_meta for parameter in meta.model.parameters())
    parameters = {id(p): p.numel() for p in meta.model.parameters()}
    assert meta.shards.bytes_read <= 4 * 1.1 * sum(parameters.values())


def test_a_graph_is_held_against_the_model_a_module_at_a_time(llama: Path, graph: Path) -> None:
    from exporter.export.parity import check_export

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

    from exporter.models.loading.meta_model import filled_while_running

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
    from exporter.export.parity import check_export

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
    from exporter.cut.surgery import prune_file
    from exporter.export.parity import check_export

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
    with raises(ModelSourceError, "file-shrank", shard.name):
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
