"""`depthcut export --heal fold`: the nodes and parameters of the bare cut, and a plain model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pipeline import _request, _walk, checkpoint, own_cache
from test_pipeline_distilled import IDS, kinds, logits

from exporter.artifacts import HealingReport, PruneReport, PruningPlan
from exporter.choose.budgets.budget import Budget
from exporter.cut.surgery import prune_file
from exporter.heal.options import HealOptions
from exporter.pipeline.request import DropRequest
from graph_passes.files.storage import load_model

pytestmark = pytest.mark.torch
__all__ = ["checkpoint", "own_cache"]  # fixtures
FOLD = HealOptions(kind="fold", calibration=("self",), sequence_length=16, samples=64)


@pytest.fixture(scope="module")
def walked(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("folded") / "out"
    drops = DropRequest(Budget(block=1))
    request = replace(_request(checkpoint, out, heal=FOLD, drops=drops), checkpoint=True)
    report, _ = _walk(request)
    return out, report


def parameters(model: Path) -> int:
    """How many numbers a graph's initialisers hold."""
    graph = load_model(model).graph
    return sum(int(np.prod(value.shape.numpy())) for value in graph.initializers.values())


def test_the_candidate_has_nodes_and_parameters_of_the_bare_cut(
    walked: Any, tmp_path: Path
) -> None:
    out, report = walked
    assert not (out / "candidate" / "whole").exists()
    plan, cut = PruningPlan.read(out / "plan.json"), tmp_path / "model.onnx"
    prune_file(out / "baseline" / "model.onnx", cut, plan.deletions)
    result = out / "candidate" / "model.onnx"
    assert kinds(result) == kinds(cut)
    assert parameters(result) == parameters(cut) < parameters(out / "baseline" / "model.onnx")
    assert not np.allclose(logits(out / "candidate"), logits(tmp_path), atol=1e-3)
    assert PruneReport.read(out / "prune.json").verification.passed
    healing = HealingReport.read(out / "healing" / "heal.json").healing
    assert report.healing == healing
    assert (healing.asked, healing.parameters, healing.training) == ("fold", 0, None)
    assert healing.changed_weights > 0
    own = next(text for text in healing.texts if text.role == "calibration")
    assert own.healed.kl < own.dropped.kl


def test_transformers_loads_the_checkpoint_without_our_code(walked: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(walked[0] / "candidate" / "hf", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config.pop("depthcut", None)
    (folder / "config.json").write_text(json.dumps(config))
    plain, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(plain).__module__.startswith("transformers.")
    assert not any(loading.values())
    with torch.inference_mode():
        wanted = plain.eval()(torch.from_numpy(IDS)).logits.numpy()
    assert np.allclose(logits(walked[0] / "candidate"), wanted, atol=1e-4)
