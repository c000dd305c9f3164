from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.errors import ExportError, MissingDependencyError
from exporter.export.forms.portable import export_with_optimum
from tests.raising import raises
from tests.reading import data_of, names_in
from tests.tiny_models import family_loaded

# The rotary base that SmolLM2 has, and the one that is taken when the config doesn't tell.
BASE, DEFAULT_BASE = 100000.0, 10000.0


def test_without_optimum_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    nothing: Any = None
    with pytest.raises(MissingDependencyError) as caught:
        export_with_optimum(nothing, tmp_path)
    assert "depthcut[optimum]" in caught.value.hint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    loaded = family_loaded("llama_tied", rope_theta=BASE)
    return loaded, export_with_optimum(loaded, tmp_path_factory.mktemp("llama"))


@pytest.mark.optimum
def test_the_folder_holds_a_plain_graph_and_its_data(llama: tuple[Any, Path]) -> None:
    loaded, path = llama
    assert names_in(path.parent) == ["model.onnx", "model.onnx.*.data"]
    graph = ir.load(path).graph
    assert not any(node.op_type == "If" for node in graph)
    names = [value.name for value in graph.inputs]
    assert names[:4] == [
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key",
    ]  # fmt: skip
    assert [value.name for value in graph.outputs][:2] == ["logits", "present.0.key"]
    weights = sum(p.numel() for p in loaded.model.parameters()) * 4
    table = loaded.model.get_input_embeddings().weight.numel() * 4
    # Equal norms may be stored once; a second copy of the tied table would stand out.
    stored = data_of(path).stat().st_size
    assert weights - table / 4 < stored < weights + table / 4


@pytest.mark.optimum
def test_no_paths_of_this_machine_are_in_the_file(llama: tuple[Any, Path]) -> None:
    content = llama[1].read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content


@pytest.mark.optimum
def test_the_graph_has_the_models_rotary_base(llama: tuple[Any, Path]) -> None:
    from exporter.export.parity import check_export

    loaded, path = llama
    checks = check_export(loaded, path)
    assert {check.phase for check in checks} == {"prefill", "decode"}
    assert all(check.passed and check.max_abs_error < 1e-5 for check in checks)


@pytest.mark.optimum
def test_a_graph_with_another_rotary_base_does_not_pass(llama: tuple[Any, Path]) -> None:
    from exporter.export.parity import check_export

    misread = family_loaded("llama_tied", rope_theta=DEFAULT_BASE)
    with raises(ExportError, "wrong-results"):
        check_export(misread, llama[1])


@pytest.mark.optimum
def test_a_cut_of_optimums_graph_equals_pytorch(llama: tuple[Any, Path], tmp_path: Path) -> None:
    from exporter.artifacts import PlannedDeletion
    from exporter.cut.surgery import prune_file
    from exporter.export.parity import check_export

    loaded, path = llama
    deletions = [PlannedDeletion(layer=0, kind="attention")]
    prune_file(path, tmp_path / "model.onnx", deletions)
    checks = check_export(loaded, tmp_path / "model.onnx", deletions=deletions)
    assert all(check.passed and check.max_abs_error < 1e-5 for check in checks)


@pytest.mark.optimum
def test_an_encoder_exports_without_a_cache(tmp_path: Path) -> None:
    from exporter.export.parity import check_export

    loaded = family_loaded("bert")
    (check,) = check_export(loaded, export_with_optimum(loaded, tmp_path))
    assert check.phase == "encode"
    assert check.max_abs_error < 1e-5


@pytest.mark.optimum
def test_pytorchs_exporter_runs_beside_transformers_4_57(tmp_path: Path) -> None:
    from exporter.export.parity import check_export
    from exporter.export.torch_export import export_onnx

    loaded = family_loaded("llama")
    checks = check_export(loaded, export_onnx(loaded, tmp_path))
    assert all(check.passed and check.max_abs_error < 1e-5 for check in checks)


@pytest.mark.optimum
def test_what_optimum_cannot_export_is_one_clear_error(tmp_path: Path) -> None:
    loaded = family_loaded("mamba")
    with raises(ExportError, "exporter-failed", "MambaForCausalLM") as caught:
        export_with_optimum(loaded, tmp_path)
    assert "\n" not in caught.value.message
    assert not list(tmp_path.iterdir())
