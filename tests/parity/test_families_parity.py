"""What is cut from a graph equals what is skipped in PyTorch, of the real model; its scores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.artifacts import PlannedDeletion, PruneReport
from tests.benchmarks.frame import default_model
from tests.exporter.plain_scores import largest_difference, plain_scores, stored, table
from tests.reading import data_of
from tests.tiny_models import family_loaded

LAYERS = 3
# Rounding in float32; DESIGN's limit is 1e-4 of the largest logit, 3e-3 here.
MAX_ERROR = 5e-4
CUTS = {
    "two attentions": [("attention", 1), ("attention", 2)],
    "attention 0": [("attention", 0)],
    "two blocks": [("block", 1), ("block", 2)],
}


def deletions(name: str) -> list[PlannedDeletion]:
    return [PlannedDeletion(layer=layer, kind=kind) for kind, layer in CUTS[name]]  # type: ignore[arg-type]


def nodes(path: Path) -> int:
    return len(ir.load(path).graph)


@pytest.fixture(scope="module")
def smollm2() -> Any:
    from exporter.models.loading.model_source import load_model

    return load_model(default_model())


@pytest.fixture(scope="module")
def shallow(smollm2: Any) -> Any:
    """Its first layers."""
    loaded = copy.deepcopy(smollm2)
    loaded.model.model.layers = loaded.model.model.layers[:LAYERS]
    loaded.model.config.num_hidden_layers = LAYERS
    return loaded


@pytest.fixture(scope="module")
def exported(shallow: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from exporter.export.torch_export import export_onnx

    return export_onnx(shallow, tmp_path_factory.mktemp("smollm2"), opset=20)


@pytest.fixture(scope="module")
def cut(
    exported: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], tuple[Path, PruneReport]]]:
    """A cut graph, checked against the masked original, removed when the module is done."""
    done: dict[str, tuple[Path, PruneReport]] = {}

    def made(name: str) -> tuple[Path, PruneReport]:
        from exporter.cut.options import CutOptions
        from exporter.cut.surgery import prune_file

        if name not in done:
            path = tmp_path_factory.mktemp("cut") / "model.onnx"
            report = prune_file(exported, path, deletions(name), CutOptions(verify="oracle"))
            done[name] = path, report
        return done[name]

    yield made
    for path, _ in done.values():
        for file in path.parent.iterdir():
            file.unlink()


@pytest.mark.real_model
def test_the_export_is_lean_and_equals_pytorch(shallow: Any, exported: Path) -> None:
    from exporter.export.parity import check_export

    path, expected = exported, 263
    checks = check_export(shallow, path)
    assert {check.phase for check in checks} == {"prefill", "decode"}
    assert max(check.max_abs_error for check in checks) < MAX_ERROR
    # Versions of the exporter differ a little.
    assert abs(nodes(path) - expected) < expected * 0.05
    # Tied embeddings once: a second table would be another 113 MB.
    assert data_of(path).stat().st_size < 160e6


@pytest.mark.real_model
@pytest.mark.parametrize("name", CUTS)
def test_a_cut_equals_pytorch_and_the_masked_original(
    shallow: Any, cut: Callable[[str], tuple[Path, PruneReport]], name: str
) -> None:
    from exporter.export.parity import check_export

    path, report = cut(name)
    assert report.verification.passed is True
    assert report.verification.max_abs_error is not None
    assert report.verification.max_abs_error < MAX_ERROR
    checks = check_export(shallow, path, deletions=deletions(name))
    assert all(check.passed for check in checks)
    assert max(check.max_abs_error for check in checks) < MAX_ERROR


@pytest.mark.real_model
def test_a_branch_that_is_cut_but_not_skipped_is_noticed(
    shallow: Any, cut: Callable[[str], tuple[Path, PruneReport]]
) -> None:
    """The same caches are gone, so only the values can tell: block 1 against attention 1."""
    from exporter.export.parity import check_export

    path, _ = cut("two blocks")
    result = [PlannedDeletion(layer=layer, kind="attention") for layer in (1, 2)]
    assert not all(check.passed for check in check_export(shallow, path, deletions=result))


@pytest.mark.real_model
@pytest.mark.long
def test_its_scores_are_those_of_stored_activations_and_near_other_texts(smollm2: Any) -> None:
    from exporter.models.texts.calibration import calibration_text
    from exporter.score.scoring import score_on

    text = calibration_text(smollm2, "pydoc", samples=6, sequence_length=256)
    scores = table(score_on(smollm2, text, batch_size=3))
    states = stored(smollm2.model, text.input_ids, "post_attention_layernorm")
    assert largest_difference(scores, plain_scores(states)) <= 1e-6
    attention = np.array(scores["attention"])
    assert set(attention.argsort()[:8]) >= {25, 26, 28}
    assert np.median(attention) == pytest.approx(0.012, abs=0.004)
    assert attention[0] == pytest.approx(0.378, abs=0.05)
    assert np.median(scores["mlp"]) == pytest.approx(0.031, abs=0.006)


@pytest.mark.torch
@pytest.mark.usefixtures("exports_once")
def test_one_graph_serves_every_size(tmp_path: Path) -> None:
    """Prefill from nothing at batch 1, in chunks, then single tokens: the same logits."""
    import torch

    from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
    from exporter.export.torch_export import export_onnx

    loaded = family_loaded("llama")
    path = export_onnx(loaded, tmp_path)
    ids = torch.randint(128, (1, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = loaded.model(input_ids=ids).logits.numpy()
    with OnnxRuntimeRunner(path, threads=1) as runner:
        empty = np.zeros((1, 2, 0, 24), np.float32)
        past = {s.name: empty for s in runner.inputs if s.name.startswith("past_key_values")}
        got = []
        for start, stop in ((0, 5), (5, 9), (9, 10), (10, 11)):
            tokens = {
                "input_ids": ids[:, start:stop].numpy(),
                "attention_mask": np.ones((1, stop), np.int64),
                "position_ids": np.arange(start, stop)[None],
            }
            outputs = runner.run({**tokens, **past})
            got.append(outputs["logits"])
            past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
    assert np.abs(np.concatenate(got, axis=1) - want).max() < 1e-5
