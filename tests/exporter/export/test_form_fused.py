"""Encoders and decoders in ONNX Runtime's fused operators: whole and cut, held against PyTorch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.engines.runners.cache_form import read_cache_form
from exporter.export.forms.onnxruntime import fuse_encoder, write_encoder, write_fused_export
from exporter.export.forms.portable import WrittenForm, fused_operators
from exporter.progress import QUIET
from graph_passes import Deletion, prune_graph, save_model
from tests.reading import names_in
from tests.tiny_models import check_export, export_onnx, family_loaded

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]


FUSED = {"Attention": 2, "BiasGelu": 2, "EmbedLayerNormalization": 1, "SkipLayerNormalization": 4}
CUT = FUSED | {"Attention": 1, "SkipLayerNormalization": 3}


@pytest.fixture(scope="module")
def bert() -> Any:
    made = family_loaded("bert", initializer_range=0.2, num_attention_heads=6)
    for name, weight in made.model.named_parameters():
        if name.endswith("bias"):
            weight.normal_(std=0.1)
    return made


@pytest.fixture(scope="module")
def plain(bert: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(bert, tmp_path_factory.mktemp("plain"), opset=20).parent


@pytest.fixture
def exported(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports once for all tests."""

    def copy(loaded: Any, folder: Path, **asked: Any) -> WrittenForm:
        assert asked["opset"] == 20
        shutil.copytree(plain, folder, dirs_exist_ok=True)
        return WrittenForm("torch")

    monkeypatch.setattr("exporter.export.forms.onnxruntime.write_portable", copy)


@pytest.fixture
def form(bert: Any, exported: None, tmp_path: Path) -> Path:
    folder = tmp_path / "form"
    folder.mkdir()
    written = write_encoder(bert, folder, QUIET)
    assert written.remark is None
    return folder


def test_an_encoder_is_fused_and_says_what_pytorch_says(bert: Any, form: Path) -> None:
    """The check's sequences are padded on the left."""
    assert fused_operators(ir.load(form / "model.onnx")) == FUSED
    assert names_in(form) == ["model.onnx", "model.onnx.*.data"]
    checks = check_export(bert, form / "model.onnx")
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("first", ["cut", "fuse"])
def test_a_cut_is_fused_too(bert: Any, plain: Path, tmp_path: Path, first: str) -> None:
    deletion = [Deletion(1, "attention")]
    whole = ir.load(plain / "model.onnx")
    if first == "fuse":
        made, _ = prune_graph(fuse_encoder(whole), deletion)
    else:
        made = fuse_encoder(prune_graph(whole, deletion)[0])
    save_model(made, tmp_path / "model.onnx")
    assert fused_operators(made) == CUT
    planned = [PlannedDeletion(layer=1, kind="attention")]
    checks = check_export(bert, tmp_path / "model.onnx", deletions=planned)
    assert all(check.passed for check in checks)


def test_what_cannot_be_fused_is_the_plain_export_and_says_so(
    bert: Any, exported: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxscript.rewriter.ort_fusions as rules

    def fail(model: ir.Model) -> None:
        raise ValueError("no such pattern")

    monkeypatch.setattr(rules, "optimize_for_ort", fail)
    written = write_encoder(bert, tmp_path, QUIET)
    assert written.passes == ()
    assert written.remark is not None
    assert "no such pattern" in written.remark
    assert fused_operators(ir.load(tmp_path / "model.onnx")) == {}


# Bounded scores, a window in every other layer, norms on both sides of each branch.
SETTINGS = {"head_dim": 32, "sliding_window": 6, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def gemma() -> Any:
    return family_loaded("gemma2", **SETTINGS)


@pytest.fixture(scope="module")
def gemma_form(gemma: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("form")
    written = write_fused_export(gemma, folder)
    assert written.remark is None
    return folder / "model.onnx"


def test_it_says_what_pytorch_says(gemma: Any, gemma_form: Path) -> None:
    model = ir.load(gemma_form)
    counts = fused_operators(model)
    assert counts["GroupQueryAttention"] == 2
    assert counts["SkipSimplifiedLayerNormalization"] == 4
    windows = [
        node.attributes.get_int("local_window_size")
        for node in model.graph
        if node.op_type == "GroupQueryAttention"
    ]
    assert windows == [6, -1]
    assert len(read_cache_form(gemma_form).shared) == 4
    assert all(check.passed for check in check_export(gemma, gemma_form))


def test_a_cut_says_what_pytorch_says_without_it(
    gemma: Any, gemma_form: Path, tmp_path: Path
) -> None:
    cut, _ = prune_graph(ir.load(gemma_form), [Deletion(0, "attention"), Deletion(1, "mlp")])
    save_model(cut, tmp_path / "model.onnx")
    assert fused_operators(cut)["SkipSimplifiedLayerNormalization"] == 2
    planned = [
        PlannedDeletion(layer=0, kind="attention"),
        PlannedDeletion(layer=1, kind="mlp"),
    ]
    checks = check_export(gemma, tmp_path / "model.onnx", deletions=planned)
    assert all(check.passed for check in checks)
