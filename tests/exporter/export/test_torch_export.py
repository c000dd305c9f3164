from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.errors import ExportError
from exporter.files import sha256_file
from exporter.progress import Quiet
from tests.raising import raises
from tests.reading import data_of
from tests.tiny_models import family_loaded

pytestmark = pytest.mark.torch

Export = Callable[..., Path]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports a family at an opset, once for the module."""
    done: dict[Any, Path] = {}

    def exported(family: str, opset: int = 20) -> Path:
        from exporter.export.torch_export import export_onnx

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


def test_a_model_without_position_ids_gets_none(export: Export) -> None:
    names = [value.name for value in ir.load(export("bloom")).graph.inputs]
    assert names[:3] == ["input_ids", "attention_mask", "past_key_values.0.key"]


def test_tied_embeddings_are_stored_once(export: Export) -> None:
    table = 128 * 96 * 4
    tied, untied = (data_of(export(family)).stat().st_size for family in ("llama_tied", "llama"))
    assert table <= untied - tied < table + 65536  # the file aligns its tensors


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
    export: Export,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from exporter.export.torch_export import export_onnx

    # The table of operators is made anew here: its making is what PyTorch talks about.
    made = ONNXRegistry.from_torchlib
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", getattr(made, "__wrapped__", made))
    first, loaded, listener = export("llama"), family_loaded("llama"), Listener()
    capfd.readouterr()
    recwarn.clear()
    again = export_onnx(loaded, tmp_path, progress=listener)
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
    from exporter.export.torch_export import export_onnx

    with raises(ExportError, "opset-out-of-range", opset) as caught:
        export_onnx(family_loaded("llama"), tmp_path / "new", opset=opset)
    assert "18 to 24" in caught.value.hint
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("family", "code"), [("t5", "encoder-decoder"), ("mamba", "no-plain-cache")]
)
def test_a_model_with_other_states_is_refused(tmp_path: Path, family: str, code: str) -> None:
    from exporter.export.torch_export import export_onnx

    with raises(ExportError, code):
        export_onnx(family_loaded(family), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_pytorch_cannot_trace_is_one_clear_error(tmp_path: Path) -> None:
    from exporter.export.torch_export import export_onnx

    loaded = family_loaded("llama", num_hidden_layers=1)
    norm = loaded.model.model.norm
    plain = norm.forward
    # The branch depends on the data, which no graph can hold.
    norm.forward = lambda x: plain(x) if bool((x.sum() > 0).item()) else plain(x) * 2
    with raises(ExportError, "exporter-failed", "LlamaForCausalLM", 20) as caught:
        export_onnx(loaded, tmp_path)
    assert "\n" not in caught.value.message
    assert caught.value.__cause__ is not None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["interface", "export"])
def test_memory_that_runs_out_is_not_the_models_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    import torch

    from exporter.export.torch_export import export_onnx

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
