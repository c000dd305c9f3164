"""`depthcut export --heal distill`: the candidate has the trained weights, the baseline its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pipeline import _request, _walk, checkpoint, own_cache

from exporter.artifacts import HealingReport, PruneReport, PruningPlan
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.cut.surgery import prune_file
from exporter.errors import PlanError
from exporter.heal.options import HealOptions
from graph_passes.files.storage import load_model
from tests.raising import raises, tells

pytestmark = pytest.mark.torch

IDS = np.arange(3, 11, dtype=np.int64)[None]
__all__ = ["checkpoint", "own_cache"]  # fixtures
DISTILL = HealOptions(
    kind="distill",
    tokens=40 * 64,
    step_tokens=64,
    sequence_length=16,
    learning_rate=0.01,
    samples=24,
)


@pytest.fixture(scope="module")
def walked(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("distilled") / "out"
    request = replace(_request(checkpoint, out, heal=DISTILL), checkpoint=True)
    report, _ = _walk(request)
    return out, report


def kinds(model: Path) -> Counter[str]:
    """How many nodes of each operator a graph has."""
    return Counter(node.op_type for node in load_model(model).graph)


def logits(folder: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    given = {}
    for spec in session.get_inputs():
        past = spec.name.startswith("past")
        shape = [1, spec.shape[1], 0, spec.shape[3]] if past else [1, 8]
        given[spec.name] = np.ones(shape, np.float32 if past else np.int64)
    known = {"input_ids": IDS, "position_ids": np.arange(8)[None]}
    given |= {name: value for name, value in known.items() if name in given}
    return session.run(["logits"], given)[0]


def test_the_candidate_is_the_bare_cut_with_other_weights(walked: Any, tmp_path: Path) -> None:
    out, report = walked
    plan = PruningPlan.read(out / "plan.json")
    prune_file(out / "baseline" / "model.onnx", tmp_path / "model.onnx", plan.deletions)
    assert kinds(out / "candidate" / "model.onnx") == kinds(tmp_path / "model.onnx")
    assert not np.allclose(logits(out / "candidate"), logits(tmp_path), atol=1e-3)
    assert PruneReport.read(out / "prune.json").verification.passed
    checks = [check for check in report.parity if "candidate" in check.name]
    assert checks
    assert all(check.passed for check in checks)


def test_the_healed_plan_says_how_and_on_what(walked: Any) -> None:
    out, report = walked
    plan = PruningPlan.read(out / "healing" / "plan.json")
    healing = HealingReport.read(out / "healing" / "heal.json").healing
    assert report.healing == healing
    assert healing.training is not None
    assert plan.changed_weights == healing.changed_weights > 0
    assert healing.parameters == 0
    losses = [check.held_out_loss for check in healing.training.checks]
    assert min(losses) < losses[0]
    roles = plan.roles
    assert set(roles) == {"chosen", "fitted", "stopped", "judged"}
    digests = [ref.ids_sha256 for refs in roles.values() for ref in refs]
    assert len(set(digests)) == len(digests)


def test_the_checkpoint_is_a_model_with_these_weights(walked: Any) -> None:
    import torch

    from exporter.checkpoint.pruned_model import load_pruned

    card = (walked[0] / "candidate" / "hf" / "README.md").read_text()
    plan = PruningPlan.read(walked[0] / "healing" / "plan.json")
    assert tells(card, plan.changed_weights)
    loaded = load_pruned(walked[0] / "candidate" / "hf")
    with torch.inference_mode():
        wanted = loaded.model(torch.from_numpy(IDS)).logits.numpy()
    assert np.allclose(logits(walked[0] / "candidate"), wanted, atol=1e-4)


def test_a_graph_with_the_old_weights_is_not_cut_by_such_a_plan(
    walked: Any, tmp_path: Path
) -> None:
    plan = LoadedPlan.read(walked[0] / "healing" / "plan.json")
    with raises(PlanError, "changed-weights-in-graph"):
        prune_file(walked[0] / "baseline" / "model.onnx", tmp_path / "cut.onnx", plan)
    assert not (tmp_path / "cut.onnx").exists()


def test_the_healed_plan_can_be_given_and_gives_the_same_candidate(
    walked: Any, checkpoint: Path, tmp_path: Path
) -> None:
    from exporter.pipeline.request import DropRequest

    given = walked[0] / "healing" / "plan.json"
    out = tmp_path / "out"
    _walk(_request(checkpoint, out, drops=DropRequest(plan=given)))
    assert np.allclose(logits(out / "candidate"), logits(walked[0] / "candidate"), atol=1e-6)
