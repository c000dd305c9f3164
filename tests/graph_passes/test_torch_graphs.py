"""The second witness: PyTorch with the same modules skipped, on graphs that PyTorch exported."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from graph_support import all_deletions, check_clean, sites_of
from tiny_torch import tiny_loaded

from exporter.artifacts import PlannedDeletion
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from graph_passes import Deletion
from graph_passes.files.storage import load_model

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]

TOLERANCE = 1e-5
EXPORTS = [("llama", 20), ("gpt2", 20), ("gpt_neox", 23), ("gemma2", 20), ("bert", 20)]


@pytest.fixture(scope="module", params=EXPORTS, ids=lambda export: f"{export[0]}-{export[1]}")
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    from exporter.export.torch_export import export_onnx

    family, opset = request.param
    loaded = tiny_loaded(family)
    return loaded, export_onnx(loaded, tmp_path_factory.mktemp(family), opset=opset)


def worst_error(loaded: Any, path: Path, deletions: list[Deletion]) -> float:
    from exporter.export.parity import check_export

    planned = [PlannedDeletion(layer=d.layer, kind=d.kind) for d in deletions]
    return max(check.max_abs_error for check in check_export(loaded, path, deletions=planned))


def cut(source: Path, target: Path, deletions: list[Deletion]) -> Path:
    planned = [PlannedDeletion(layer=d.layer, kind=d.kind) for d in deletions]
    prune_file(source, target, planned, CutOptions(verify="none"))
    return target


def test_all_subsets_equal_pytorch_with_the_modules_skipped(
    exported: tuple[Any, Path], tmp_path: Path
) -> None:
    loaded, source = exported
    everything = all_deletions(load_model(source))
    assert [(d.layer, d.kind) for d in everything] == [
        (0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp"),
    ]  # fmt: skip
    subsets = [list(c) for n in (1, 2, 3) for c in combinations(everything, n)]
    errors = [
        worst_error(loaded, cut(source, tmp_path / str(i) / "m.onnx", subset), subset)
        for i, subset in enumerate(subsets)
    ]
    assert len(errors) == 14
    assert max(errors) < TOLERANCE


def test_pytorch_catches_the_wrong_layer(exported: tuple[Any, Path], tmp_path: Path) -> None:
    loaded, source = exported
    wrong = cut(source, tmp_path / "m.onnx", [Deletion(1, "mlp")])
    assert worst_error(loaded, wrong, [Deletion(0, "mlp")]) > 1e-3


def test_results_are_clean(exported: tuple[Any, Path], tmp_path: Path) -> None:
    for i, deletion in enumerate(all_deletions(load_model(exported[1]))):
        path = cut(exported[1], tmp_path / str(i) / "m.onnx", [deletion])
        check_clean(load_model(path), path)


def test_each_attention_owns_its_caches(exported: tuple[Any, Path]) -> None:
    model = load_model(exported[1])
    declared = [value.name for value in model.graph.inputs if "past" in (value.name or "")]
    assert [name for site in sites_of(model) for name in site.kv_inputs] == declared
