"""The second witness for fused graphs: PyTorch, on what ONNX Runtime's transformers tool fuses."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from graph_support import all_deletions, check_tidy, sites_of
from test_torch_graphs import TOLERANCE, cut, worst_error
from tiny_torch import tiny_loaded

from exporter.artifacts import PlannedDeletion
from exporter.cut.surgery import prune_file
from graph_passes import Deletion
from graph_passes.files.storage import load_model

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]

# The tool's own pass for GPT-2 fails on a language head without a bias; BERT's does the same.
FUSIONS = {
    "bert": ("bert", "SkipLayerNormalization", 4),
    "gpt2": ("bert", "SkipLayerNormalization", 4),
    "llama": ("gpt_neox", "SkipSimplifiedLayerNormalization", 4),
    "gpt_neox": ("gpt_neox", "SkipLayerNormalization", 2),
    "gemma2": ("gpt_neox", "SkipSimplifiedLayerNormalization", 4),
}


@pytest.fixture(scope="module", params=FUSIONS)
def fused(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    from onnxruntime.transformers.optimizer import optimize_model

    from exporter.export.torch_export import export_onnx

    loaded, folder = tiny_loaded(request.param), tmp_path_factory.mktemp(request.param)
    for name, weight in loaded.model.named_parameters():
        if name.endswith("bias"):  # zero by default, which would hide whose bias goes where
            weight.normal_(std=0.1)
    source = export_onnx(loaded, folder, opset=20)
    model_type, op_type, count = FUSIONS[request.param]
    optimised = optimize_model(str(source), model_type=model_type, num_heads=4, opt_level=0)
    target = folder / "fused.onnx"
    optimised.save_model_to_file(str(target))
    assert Counter(node.op_type for node in load_model(target).graph)[op_type] == count
    return loaded, target


def test_all_subsets_equal_pytorch_with_the_modules_skipped(
    fused: tuple[Any, Path], tmp_path: Path
) -> None:
    loaded, source = fused
    everything = all_deletions(load_model(source))
    assert [(d.layer, d.kind) for d in everything] == [
        (0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp"),
    ]  # fmt: skip
    for n in (1, 2, 3):
        for i, subset in enumerate(combinations(everything, n)):
            pruned = cut(source, tmp_path / f"{n}.{i}" / "m.onnx", list(subset))
            assert worst_error(loaded, pruned, list(subset)) < TOLERANCE
            check_tidy(load_model(pruned))


def test_pytorch_catches_the_wrong_layer(fused: tuple[Any, Path], tmp_path: Path) -> None:
    loaded, source = fused
    wrong = cut(source, tmp_path / "m.onnx", [Deletion(1, "mlp")])
    assert worst_error(loaded, wrong, [Deletion(0, "mlp")]) > 1e-3


def test_neighbours_stay_fused(fused: tuple[Any, Path], tmp_path: Path) -> None:
    source = load_model(fused[1])
    before = Counter(node.op_type for node in source.graph)
    pruned = load_model(cut(fused[1], tmp_path / "m.onnx", [Deletion(1, "block")]))
    after = Counter(node.op_type for node in pruned.graph)
    joints = {site.residual_add for site in sites_of(source) if site.layer == 1}
    gone = sum("Skip" in n.op_type and n.name in joints for n in source.graph)
    skip_norms = [op_type for op_type in before if op_type.startswith("Skip")]
    assert sum(before[o] - after[o] for o in skip_norms) == gone


@pytest.mark.filterwarnings("ignore")  # the exporter that these fusions are made for is old
def test_a_bert_that_is_fused_whole(tmp_path: Path) -> None:
    """Embeddings, attentions and sums, each one operator: what the tool makes of TorchScript."""
    import torch
    from onnxruntime.transformers.optimizer import optimize_model

    bert = tiny_loaded("bert", attn_implementation="eager").model
    names = ["input_ids", "attention_mask", "token_type_ids"]

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, *inputs: Any) -> Any:
            return self.bert(**dict(zip(names, inputs, strict=True))).last_hidden_state

    example = (torch.ones(2, 6, dtype=torch.long),) * 3
    source, target = tmp_path / "bert.onnx", tmp_path / "fused.onnx"
    torch.onnx.export(
        Encoder(), example, str(source), dynamo=False, opset_version=14, input_names=names,
        dynamic_axes={name: {0: "batch", 1: "seq"} for name in names},
    )  # fmt: skip
    fused = optimize_model(str(source), model_type="bert", num_heads=4, hidden_size=96, opt_level=0)
    fused.save_model_to_file(str(target))
    before = Counter(node.op_type for node in load_model(target).graph)
    assert before["EmbedLayerNormalization"] == 1
    assert before["Attention"] == 2
    everything = all_deletions(load_model(target))
    assert [d.kind for d in everything] == ["attention", "mlp"] * 2
    for n in (1, 2, 3):
        for i, subset in enumerate(combinations(everything, n)):
            planned = [PlannedDeletion(layer=d.layer, kind=d.kind) for d in subset]
            report = prune_file(target, tmp_path / f"{n}.{i}" / "m.onnx", planned)
            assert report.verification.passed
            assert report.verification.max_abs_error is not None
            assert report.verification.max_abs_error < TOLERANCE
