"""`depthcut export` for a budget, with a checkpoint, forced, and streamed."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from test_pipeline import RESULTS, SHIPPED, _request, _walk

from exporter import cli
from exporter.artifacts import HealingReport, ImportanceReport, PruneReport, PruningPlan
from exporter.checkpoint.pruned_model import load_pruned
from exporter.choose.budgets.budget import Budget, Floors, SearchOptions
from exporter.choose.costs.table import RequestShape
from exporter.cli.export import export
from exporter.errors import PlanError, UnknownArchitectureError, UnmetGoalError
from exporter.heal.options import HealOptions
from exporter.models.loading.model_files import save_checkpoint
from exporter.pipeline.request import DropRequest
from graph_passes.types import Replacement
from tests.made_tables import make_times
from tests.raising import raises
from tests.reading import in_file, names_in
from tests.tiny_models import tiny_loaded

pytestmark = pytest.mark.torch


AT = RequestShape(batch=1, prompt=8, new=2)


@pytest.fixture
def made_times(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every sublayer saves a tenth of a request; the graphs that this is asked of."""
    return make_times(monkeypatch, dict.fromkeys(get_args(Replacement), 10.0), str(AT))


def test_the_largest_cut_that_keeps_its_quality_is_cut_with_its_healed_weights(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    heal = HealOptions(kind="fold", samples=12, sequence_length=16)
    result = _request(
        checkpoint, out, drops=DropRequest(Budget(floors=Floors(0.5))), heal=heal,
        search=SearchOptions(search="auto"),
    )  # fmt: skip
    report, _ = _walk(result)
    plan = PruningPlan.read(out / "plan.json")
    assert plan.tried[-1].holds
    assert plan.changed_weights > 0
    assert report.healing == HealingReport.read(out / "plan.report.json").healing
    assert all(check.passed for check in report.parity)
    assert PruneReport.read(out / "prune.json").verification.passed is True
    _, heard = _walk(result)
    assert set(heard.reused) >= {"score", "export", "plan", "prune", "measure"}
    before = (out / "plan.json").read_bytes()
    never = replace(result, drops=DropRequest(Budget(floors=Floors(1e-12, 0.999999))))
    # Times decide which cuts are tried: one that changes nothing may leave it undecided.
    for request in (never, replace(never, out=tmp_path / "other")):
        with pytest.raises(UnmetGoalError) as refused:
            _walk(request)
        assert refused.value.code.endswith("nothing-within-limits")
    assert (out / "plan.json").read_bytes() == before
    there = {path.name for path in (tmp_path / "other").iterdir()}
    assert there == {".depthcut", "importance.json", "baseline"}


def test_without_a_number_the_cut_is_trained_checked_and_compared(
    checkpoint: Path, tmp_path: Path, made_times: list[Path]
) -> None:
    """What `depthcut export MODEL -o out` does, with fewer tokens."""
    out = tmp_path / "out"
    result = export.read([str(checkpoint), "-o", str(out), "--at-most", "90%", "--at", str(AT)])
    usual, tiny = result.request, _request(checkpoint, out)
    assert usual.heal is not None
    heal = replace(
        usual.heal, tokens=12 * 64, step_tokens=64, sequence_length=16, samples=24, time_s=3600.0
    )
    report, heard = _walk(replace(usual, heal=heal, score=tiny.score, compare=tiny.compare))
    plan = PruningPlan.read(out / "plan.json")
    assert plan.tried[0].healed_by == "distill"
    assert plan.tried[0].training_seconds > 0
    assert plan.tried[-1].holds
    assert plan.budget["at"] == str(AT)
    assert plan.predicted["speedup"] > 1
    assert plan.changed_weights > 0
    assert report.healing is not None
    assert report.healing.training is not None
    assert [graph.name for graph in made_times] == ["model.onnx"]
    assert all(check.passed for check in report.parity)
    assert PruneReport.read(out / "prune.json").verification.passed is True
    assert any("more" in line and "time" in line for line in heard.lines), "what more time gives"


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
    assert not (folder / "out" / "checkpoint").exists()
    _, heard = _walk(replace(request, checkpoint=True))
    return folder / "out", plan, heard


def test_the_candidate_keeps_its_graph_and_gains_the_checkpoint(walked: Any) -> None:
    out, _, heard = walked
    assert heard.reused == [*FORMER, "measure"]
    assert {*names_in(out / "candidate")} >= BEFORE
    assert {*names_in(out / "checkpoint")} >= {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert not (out / ".depthcut" / "work").exists()
    assert load_pruned(out / "checkpoint").tokenizer is not None
    lines = [line for line in heard.lines if "candidate against the checkpoint" in line]
    assert len(lines) == 4
    assert all("holds" in line for line in lines)


def test_the_plan_is_written_in_our_words_and_the_card_tells_what_was_measured(
    walked: Any,
) -> None:
    out, plan, _ = walked
    written = json.loads((out / "plan.json").read_text())
    assert [(d["kind"], d["layer"]) for d in written["deletions"]] == [("attention", 1)]
    assert written["kind"] == "pruning_plan"
    card = (out / "checkpoint" / "README.md").read_text()
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
    assert heard.reused == [*FORMER, "measure", "checkpoint"]
    (out / "candidate" / "model.onnx").unlink()
    _, heard = _walk(replace(_request(checkpoint, out, drops=drops), checkpoint=True))
    assert "prune" not in heard.reused
    assert heard.reused[-1] == "checkpoint"
    assert {*names_in(out / "candidate")} >= BEFORE


def test_another_plan_takes_the_old_checkpoint_away(
    walked: Any, checkpoint: Path, tmp_path: Path
) -> None:
    """Of whole blocks it is a plain model, whose layers the graph has under other numbers."""
    out = Path(shutil.copytree(walked[0], tmp_path / "out"))
    request = _request(checkpoint, out, drops=DropRequest(Budget(block=1)))
    _, heard = _walk(replace(request, checkpoint=True))
    assert heard.reused == ["score", "export"]
    config = json.loads((out / "checkpoint" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert "depthcut" not in config


def test_what_has_no_checkpoint_is_refused_before_it_is_scored(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tiny_loaded("vit"), tmp_path / "vit")
    request = replace(_request(tmp_path / "vit", tmp_path / "out"), checkpoint=True)
    with raises(UnknownArchitectureError, "takes-no-tokens", "ViT"):
        _walk(request)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("exporter.checkpoint.streamed.FAMILIES", {})
    request = replace(_request(checkpoint, tmp_path / "out"), checkpoint=True, stream=True)
    with pytest.raises(UnknownArchitectureError):
        _walk(request)
    assert not (tmp_path / "out" / "importance.json").exists()


EVERYTHING = DropRequest(Budget(joint=6))


def test_everything_goes_and_equals_pytorch_and_the_oracle(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    request = _request(checkpoint, out, drops=EVERYTHING, allow_empty=True)
    report, _ = _walk(request)
    pruned = PruneReport.read(out / "prune.json")
    assert len(pruned.deleted) == 6
    assert pruned.verification.passed
    assert all(check.passed for check in report.parity)
    assert report.arms.candidate.kv_cache_bytes_per_token == 0
    before = (out / "plan.json").read_bytes()
    with raises(PlanError, "nothing-left"):
        _walk(_request(checkpoint, out, drops=EVERYTHING))  # though no stage is to be redone
    assert (out / "plan.json").read_bytes() == before


SHORT = ("--samples", "4", "--sequence-length", "16", "batch_size: 2", "--drop-attn", "1")


def run(checkpoint: Path, out: Path, *options: str) -> tuple[int, str, str]:
    """The exit code, and both streams."""
    text = out.with_name("text.txt")
    text.write_text("w1 w2 w3 w5 w8 w13 w21 w34 " * 20)
    given = ["--stream", "--calibration", str(text), *SHORT, *options]
    arguments = ["export", str(checkpoint), "-o", str(out), *in_file(out.parent, given)]
    with (
        contextlib.redirect_stdout(io.StringIO()) as result,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        code = cli.run(arguments)
    return code, result.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def streamed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("streamed") / "out"
    return out, run(checkpoint, out, "--no-measure", "--checkpoint")


@pytest.mark.long
def test_it_writes_both_models_and_no_report(streamed: Any) -> None:
    out, (code, stdout, stderr) = streamed
    assert code == 0, stderr
    assert "million parameters, not compared" in stdout
    names = {path.name for path in out.iterdir()}
    assert (out / "checkpoint" / "README.md").is_file()
    for checked in (
        "candidate against the checkpoint", "baseline against PyTorch",
        "candidate against PyTorch with the same modules skipped",
    ):  # fmt: skip
        assert f"{checked}, decode, logits: holds" in stderr
    assert names == {name for name in RESULTS if not name.startswith("report")} | {
        ".depthcut",
        "checkpoint",
    }
    for arm in ("baseline", "candidate"):
        assert {*names_in(out / arm)} >= SHIPPED
    assert len(ImportanceReport.read(out / "importance.json").scores) == 3 * 3
    assert PruneReport.read(out / "prune.json").verification.passed
