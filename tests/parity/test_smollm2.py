"""The real model: what is cut from the graph equals what is skipped in PyTorch; its scores.

Exporting it takes a minute, so what needs the export or its scores stands in this file, in one
opset; ``test_families.py`` and ``test_torch_export.py`` have the other, on tiny models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from written_files import data_of

from exporter.artifacts import PlannedDeletion, PruneReport
from tests.exporter.plain_scores import largest_difference, plain_scores, stored, table

pytestmark = pytest.mark.real_model

# Rounding of 30 layers in float32; DESIGN's limit is 1e-4 of the largest logit, 3e-3 here.
MAX_ERROR = 5e-4
EIGHT = (4, 5, 6, 7, 14, 25, 26, 28)
CUTS = {
    "eight attentions": [("attention", layer) for layer in EIGHT],
    "attention 0": [("attention", 0)],
    "two blocks": [("block", 14), ("block", 25)],
}


def deletions(name: str) -> list[PlannedDeletion]:
    return [PlannedDeletion(layer=layer, kind=kind) for kind, layer in CUTS[name]]  # type: ignore[arg-type]


def nodes(path: Path) -> int:
    return len(ir.load(path).graph)


@pytest.fixture(scope="module")
def cut(
    smollm2_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], tuple[Path, PruneReport]]]:
    """A cut graph, checked against the masked original, removed when the module is done."""
    done: dict[str, tuple[Path, PruneReport]] = {}

    def made(name: str) -> tuple[Path, PruneReport]:
        from exporter.cut.options import CutOptions
        from exporter.cut.surgery import prune_file

        if name not in done:
            path = tmp_path_factory.mktemp("cut") / "model.onnx"
            report = prune_file(smollm2_onnx, path, deletions(name), CutOptions(verify="oracle"))
            done[name] = path, report
        return done[name]

    yield made
    for path, _ in done.values():
        for file in path.parent.iterdir():
            file.unlink()


def test_the_export_is_lean_and_equals_pytorch(smollm2: Any, smollm2_onnx: Path) -> None:
    from exporter.export.parity import check_export

    path, expected = smollm2_onnx, 2245
    checks = check_export(smollm2, path)
    assert {check.phase for check in checks} == {"prefill", "decode"}
    assert max(check.max_abs_error for check in checks) < MAX_ERROR
    # Versions of the exporter differ a little.
    assert abs(nodes(path) - expected) < expected * 0.05
    # Tied embeddings once: a second table would be another 113 MB.
    assert data_of(path).stat().st_size < 540e6


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_equals_pytorch_and_the_masked_original(
    smollm2: Any, cut: Callable[[str], tuple[Path, PruneReport]], name: str
) -> None:
    from exporter.export.parity import check_export

    path, report = cut(name)
    assert report.verification.passed is True
    assert report.verification.max_abs_error is not None
    assert report.verification.max_abs_error < MAX_ERROR
    checks = check_export(smollm2, path, deletions=deletions(name))
    assert all(check.passed for check in checks)
    assert max(check.max_abs_error for check in checks) < MAX_ERROR


def test_a_branch_that_is_cut_but_not_skipped_is_noticed(
    smollm2: Any, cut: Callable[[str], tuple[Path, PruneReport]]
) -> None:
    """The same caches are gone, so only the values can tell: block 14 against attention 14."""
    from exporter.export.parity import check_export

    path, _ = cut("two blocks")
    told = [PlannedDeletion(layer=layer, kind="attention") for layer in (14, 25)]
    assert not all(check.passed for check in check_export(smollm2, path, deletions=told))


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
