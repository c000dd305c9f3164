"""`depthcut export --checkpoint`: the pruned Hugging Face model in the candidate's folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import _request, _walk, checkpoint, own_cache

from exporter.choose.budgets.budget import Budget
from exporter.errors import UnknownArchitectureError
from exporter.pipeline.request import DropRequest
from tests.raising import raises
from tests.reading import names_in

pytestmark = pytest.mark.torch

__all__ = ["checkpoint", "own_cache"]  # fixtures
FORMER = ["score", "plan", "export", "prune"]
BEFORE = {"model.onnx", "model.onnx.*.data", "config.json"}


@pytest.fixture(scope="module")
def walked(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Once without a checkpoint, by a plan in LLM-Drop's words, and once more with one."""
    folder = tmp_path_factory.mktemp("checkpoint")
    plan = folder / "config.json"
    plan.write_text(json.dumps({"drop_attn_list": [1], "drop_mlp_list": [], "x": 1}))
    request = _request(checkpoint, folder / "out", drops=DropRequest(plan=plan))
    _walk(request)
    assert not (folder / "out" / "candidate" / "hf").exists()
    _, heard = _walk(replace(request, checkpoint=True))
    return folder / "out", plan, heard


def files_of(folder: Path) -> set[str]:
    return {*names_in(folder)}


def test_the_candidate_keeps_its_graph_and_gains_the_checkpoint(walked: Any) -> None:
    from exporter.checkpoint.pruned_model import load_pruned

    out, _, heard = walked
    assert heard.reused == [*FORMER, "measure"]
    assert files_of(out / "candidate") >= {*BEFORE, "hf"}
    assert files_of(out / "candidate" / "hf") >= {"README.md", "config.json", "model.safetensors"}
    assert not (out / ".depthcut" / "work").exists()
    assert load_pruned(out / "candidate" / "hf").tokenizer is not None
    lines = [line for line in heard.lines if "candidate against the checkpoint" in line]
    assert len(lines) == 4
    assert all("holds" in line for line in lines)


def test_the_plan_is_written_in_our_words(walked: Any) -> None:
    plan = json.loads((walked[0] / "plan.json").read_text())
    assert [(d["kind"], d["layer"]) for d in plan["deletions"]] == [("attention", 1)]
    assert plan["kind"] == "pruning_plan"


def test_the_card_tells_what_was_measured(walked: Any) -> None:
    out, plan, _ = walked
    card = (out / "candidate" / "hf" / "README.md").read_text()
    report = json.loads((out / "report.json").read_text())
    assert f"{report['accuracy']['perplexity']['candidate']:.4g}" in card
    assert report["environment"]["processor"] in card
    assert "By a plan that came without scores." in card
    assert "cosine" not in card  # of this run, and not what LLM-Drop's plan rests on
    assert str(out) not in card
    assert str(plan.parent) not in card


def test_nothing_is_written_twice(walked: Any, checkpoint: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(walked[0], tmp_path / "out"))
    drops = DropRequest(plan=walked[1])
    _, heard = _walk(replace(_request(checkpoint, out, drops=drops), checkpoint=True))
    assert heard.reused == [*FORMER, "hf", "measure", "card"]
    (out / "candidate" / "model.onnx").unlink()
    _, heard = _walk(replace(_request(checkpoint, out, drops=drops), checkpoint=True))
    assert "prune" not in heard.reused
    assert files_of(out / "candidate") >= {*BEFORE, "hf"}
    assert files_of(out / "candidate" / "hf") == files_of(walked[0] / "candidate" / "hf")


def test_another_plan_takes_the_old_checkpoint_away(
    walked: Any, checkpoint: Path, tmp_path: Path
) -> None:
    """Of whole blocks it is a plain model, whose layers the graph has under other numbers."""
    out = Path(shutil.copytree(walked[0], tmp_path / "out"))
    request = _request(checkpoint, out, drops=DropRequest(Budget(block=1)))
    _, heard = _walk(replace(request, checkpoint=True))
    assert heard.reused == ["score", "export"]
    config = json.loads((out / "candidate" / "hf" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert "depthcut" not in config


def test_a_model_of_images_is_refused_before_it_is_scored(tmp_path: Path) -> None:
    from exporter.models.loading.model_files import save_checkpoint
    from tests.tiny_models import tiny_loaded

    save_checkpoint(tiny_loaded("vit"), tmp_path / "vit")
    request = replace(_request(tmp_path / "vit", tmp_path / "out"), checkpoint=True)
    with raises(UnknownArchitectureError, "takes-no-tokens", "ViT"):
        _walk(request)
    assert not (tmp_path / "out").exists()


def test_a_family_that_is_not_known_is_refused_before_it_is_scored_by_layers(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.checkpoint import streamed

    monkeypatch.setattr(streamed, "FAMILIES", {})
    request = replace(_request(checkpoint, tmp_path / "out"), checkpoint=True, stream=True)
    with pytest.raises(UnknownArchitectureError):
        _walk(request)
    assert not (tmp_path / "out" / "importance.json").exists()
