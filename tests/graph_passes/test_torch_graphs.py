"""The second witness: PyTorch with the same modules skipped, on graphs that PyTorch exported."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from graph_support import all_deletions, check_clean, check_tidy, sites_of

from exporter.artifacts import PlannedDeletion
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from graph_passes import Deletion
from graph_passes.files.storage import load_model
from tests.tiny_models import family_loaded

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]

TOLERANCE = 1e-5


class Export(NamedTuple):
    """A family at an opset, and what onnxruntime's transformers tool is told to fuse in it."""

    family: str
    opset: int = 20
    fused_as: str = ""
    operator: str = ""
    count: int = 0


_LAYER, _SIMPLIFIED = "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"
# The tool's own pass for GPT-2 fails on a language head without a bias; BERT's does the same.
EXPORTS = [
    *(Export(family) for family in ("llama", "gpt2", "gemma2", "bert", "mixtral")),
    *(Export(family, 23) for family in ("llama", "gpt_neox")),
    Export("bert", 20, "bert", _LAYER, 4),
    Export("gpt2", 20, "bert", _LAYER, 4),
    Export("llama", 20, "gpt_neox", _SIMPLIFIED, 4),
    Export("gpt_neox", 20, "gpt_neox", _LAYER, 2),
    Export("gemma2", 20, "gpt_neox", _SIMPLIFIED, 4),
]


@pytest.fixture(
    scope="module", params=EXPORTS, ids=lambda e: f"{e.family}-{e.opset}{'-fused' * bool(e.count)}"
)
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    from exporter.export.torch_export import export_onnx

    export: Export = request.param
    loaded, folder = family_loaded(export.family), tmp_path_factory.mktemp(export.family)
    for name, weight in loaded.model.named_parameters():
        if name.endswith("bias"):  # zero by default, which would hide whose bias goes where
            weight.normal_(std=0.1)
    source = export_onnx(loaded, folder, opset=export.opset)
    if not export.count:
        return loaded, source
    from onnxruntime.transformers.optimizer import optimize_model

    made = optimize_model(str(source), model_type=export.fused_as, num_heads=4, opt_level=0)
    made.save_model_to_file(str(folder / "fused.onnx"))
    operators = Counter(node.op_type for node in load_model(folder / "fused.onnx").graph)
    assert operators[export.operator] == export.count
    return loaded, folder / "fused.onnx"


def worst_error(loaded: Any, path: Path, deletions: list[Deletion]) -> float:
    from exporter.export.parity import check_export

    planned = [PlannedDeletion(layer=d.layer, kind=d.kind) for d in deletions]
    return max(check.max_abs_error for check in check_export(loaded, path, deletions=planned))


def cut(source: Path, target: Path, deletions: list[Deletion]) -> Path:
    planned = [PlannedDeletion(layer=d.layer, kind=d.kind) for d in deletions]
    prune_file(source, target, planned, CutOptions(verify="none"))
    return target


def skip_norms(path: Path) -> dict[str, str]:
    nodes = load_model(path).graph
    return {node.name or "": node.op_type for node in nodes if node.op_type.startswith("Skip")}


def test_all_subsets_equal_pytorch_with_the_modules_skipped(
    exported: tuple[Any, Path], tmp_path: Path
) -> None:
    loaded, source = exported
    assert worst_error(loaded, source, []) < TOLERANCE
    everything = all_deletions(load_model(source))
    assert [(d.layer, d.kind) for d in everything] == [
        (0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp"),
    ]  # fmt: skip
    subsets = [list(c) for n in (1, 2, 3) for c in combinations(everything, n)]
    for number, subset in enumerate(subsets):
        path = cut(source, tmp_path / str(number) / "m.onnx", subset)
        assert worst_error(loaded, path, subset) < TOLERANCE
        if skip_norms(source):
            check_tidy(load_model(path))
        else:
            check_clean(load_model(path), path)


def test_pytorch_catches_the_wrong_layer(exported: tuple[Any, Path], tmp_path: Path) -> None:
    loaded, source = exported
    wrong = cut(source, tmp_path / "m.onnx", [Deletion(1, "mlp")])
    assert worst_error(loaded, wrong, [Deletion(0, "mlp")]) > 1e-3


def test_each_attention_owns_its_caches(exported: tuple[Any, Path]) -> None:
    model = load_model(exported[1])
    declared = [value.name for value in model.graph.inputs if "past" in (value.name or "")]
    assert [name for site in sites_of(model) for name in site.kv_inputs] == declared


def test_neighbours_stay_fused(exported: tuple[Any, Path], tmp_path: Path) -> None:
    before = skip_norms(exported[1])
    joints = {site.residual_add for site in sites_of(load_model(exported[1])) if site.layer == 1}
    after = skip_norms(cut(exported[1], tmp_path / "m.onnx", [Deletion(1, "block")]))
    assert len(before) - len(after) == len(before.keys() & joints)
