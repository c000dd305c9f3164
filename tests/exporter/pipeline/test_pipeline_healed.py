"""`depthcut export` with what heals a cut: replacements, trained weights, folded ones."""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pipeline import _request, _walk

from exporter.artifacts import (
    CalibrationRef,
    HealingReport,
    ImportanceReport,
    ModelRef,
    PruneReport,
    PruningPlan,
)
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.artifacts.plans import MODEL_KEY, noted_texts
from exporter.checkpoint.pruned_model import load_pruned
from exporter.compare.options import CompareOptions
from exporter.cut.surgery import prune_file
from exporter.errors import ComparisonError, PlanError
from exporter.files import sha256_file
from exporter.heal.options import HealOptions
from exporter.heal.plan_file import report_of, write_healed_plan
from exporter.models.ablation.branch_replacements import BranchReplacement
from exporter.pipeline.request import DropRequest
from exporter.pipeline.road import refuse_deciding_text
from exporter.pipeline.run import Run
from exporter.progress import QUIET
from graph_passes.files.storage import load_model
from graph_passes.replacements import array_of
from tests.made_reports import full_report
from tests.raising import raises, tells
from tests.tiny_models import planned, random_replacements

pytestmark = pytest.mark.torch


PLAN = planned(("attention", 1, "linear"), ("mlp", 2, "bias"), ("mlp", 0, "none"))
HIDDEN = 32


def write_healed(
    path: Path, *, seed: int = 0, hidden: int = HIDDEN, report: Any = None, model: str | None = None
) -> Path:
    """A plan with random numbers."""
    import torch

    given = random_replacements(hidden, PLAN, seed=seed)
    branch_replacements = {
        (ref.layer, ref.kind): BranchReplacement(
            *(torch.tensor(array_of(item)) for item in (one.bias, one.weight) if item is not None)
        )
        for ref, one in given.tensors.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    plan = PruningPlan(deletions=PLAN)
    if model is not None:
        plan = plan.model_copy(update={"made_from": {"model": model}})
    write_healed_plan(path, plan, branch_replacements, report=report)  # type: ignore[arg-type]
    return path


def made_report() -> HealingReport:
    """A report of a healing that never was."""
    known = full_report()
    assert known.healing is not None
    model = ModelRef(source="elsewhere", architecture="Llama", num_layers=3, sha256="ab")
    return HealingReport(model=model, healing=known.healing)


@pytest.fixture(scope="module")
def walked(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    folder = tmp_path_factory.mktemp("healed")
    plan = write_healed(folder / "mine" / "healed.json")
    report, _ = _walk(_request(checkpoint, folder / "out", drops=DropRequest(plan=plan)))
    return folder / "out", plan, report


def test_the_candidate_holds_the_replacements(walked: Any) -> None:
    out, plan, report = walked
    assert (out / "plan.json").read_bytes() == plan.read_bytes()
    numbers = plan.with_suffix(".safetensors")
    assert (out / "healed.safetensors").read_bytes() == numbers.read_bytes()
    pruned = PruneReport.read(out / "prune.json")
    assert pruned.verification.passed
    replacements = {(entry.kind, entry.layer): entry.replacement for entry in pruned.deleted}
    assert replacements == {("attention", 1): "linear", ("mlp", 2): "bias", ("mlp", 0): "none"}
    weights = load_model(out / "candidate" / "model.onnx").graph.initializers
    assert "depthcut.attention.1.weight" in weights
    assert [entry.replacement for entry in report.plan] == ["linear", "bias", "none"]
    assert report.healing is None  # nobody told of it
    assert not (out / "plan.report.json").exists()
    for name in ("report.md", "report.html"):
        assert "Replaced: 2 of 3 deletions." in (out / name).read_text()


def test_the_same_plan_is_reused_and_other_numbers_are_not(
    walked: Any, checkpoint: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(walked[0], tmp_path / "out"))
    _, heard = _walk(_request(checkpoint, out, drops=DropRequest(plan=walked[1])))
    assert heard.reused == ["score", "plan", "export", "prune", "measure"]
    result = made_report()
    other = write_healed(tmp_path / "other" / "other.json", seed=1, report=result)
    report, heard = _walk(_request(checkpoint, out, drops=DropRequest(plan=other)))
    assert heard.reused == ["score", "export"]
    assert (out / "other.safetensors").exists()
    assert report.healing == result.healing  # what healing it gave, elsewhere
    assert (out / "plan.report.json").read_bytes() == result.to_json().encode()
    assert "is not known" not in (out / "report.md").read_text()
    assert not (out / "healed.safetensors").exists()  # of the run before
    bare = tmp_path / "bare.json"
    deletions = [d.model_copy(update={"replacement": "none"}) for d in PLAN]
    PruningPlan(deletions=deletions).write(bare)
    report, _ = _walk(_request(checkpoint, out, drops=DropRequest(plan=bare)))
    assert not list(out.glob("*.safetensors"))
    assert not (out / "plan.report.json").exists()
    assert report.healing is None
    assert "Replaced:" not in (out / "report.md").read_text()


def test_only_the_report_that_was_written_with_a_plan_is_its_own(tmp_path: Path) -> None:
    path = write_healed(tmp_path / "mine" / "healed.json", report=made_report())
    report = path.with_name("healed.report.json")
    plan = PruningPlan.read(path)
    assert report_of(plan, path) == report
    copy = Path(shutil.copy(path, path.with_name("copy.json")))
    assert report_of(PruningPlan.read(copy), copy) == report  # it lies beside the numbers
    report.write_text(report.read_text().replace("elsewhere", "here"))
    assert report_of(plan, path) is None
    report.unlink()
    assert report_of(plan, path) is None
    healed_again = write_healed(path)
    assert "healing_report" not in PruningPlan.read(healed_again).made_from


@pytest.mark.parametrize(
    ("given", "code", "named"),
    [
        ({"hidden": 48}, "wrong-shape", (48, 32)),
        ({"model": "f" * 64}, "another-model", ("ffffffffffff",)),
    ],
)
def test_numbers_of_another_model_are_refused_before_the_export(
    walked: Any, checkpoint: Path, tmp_path: Path, given: Any, code: str, named: Any
) -> None:
    ours = ImportanceReport.read(walked[0] / "importance.json").model.sha256
    for arm in ("baseline", "candidate"):
        assert load_model(walked[0] / arm / "model.onnx").metadata_props[MODEL_KEY] == ours
    plan = write_healed(tmp_path / "mine" / "healed.json", **given)
    request = _request(checkpoint, tmp_path / "out", drops=DropRequest(plan=plan))
    with raises(PlanError, code, *named):
        _walk(request)
    assert not (tmp_path / "out" / "baseline").exists()


def test_export_heals_on_the_road_and_tells_what_it_gained(
    walked: Any, checkpoint: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(walked[0], tmp_path / "out"))
    bare = tmp_path / "bare.json"
    PruningPlan(deletions=PLAN[2:]).write(bare)
    heal = HealOptions(kind="linear", samples=4, sequence_length=16)
    request = _request(checkpoint, out, drops=DropRequest(plan=bare), heal=heal)
    report, _ = _walk(request)
    healing = out / "healing"
    assert {path.name for path in healing.iterdir()} == {
        "plan.json", "plan.safetensors", "heal.json",
    }  # fmt: skip
    assert (out / "plan.json").read_bytes() == bare.read_bytes()
    pruned = PruneReport.read(out / "prune.json")
    assert pruned.made_from["plan"] == sha256_file(healing / "plan.json")
    assert pruned.made_from["replacements"] == sha256_file(healing / "plan.safetensors")
    assert report.healing == HealingReport.read(healing / "heal.json").healing
    assert report.healing is not None
    assert [text.role for text in report.healing.texts] == ["calibration", "other"]
    healed = PruningPlan.read(healing / "plan.json")
    assert list(healed.roles) == ["fitted", "judged"]
    assert report.parts == healed.parts
    noted = noted_texts(load_model(out / "candidate" / "model.onnx").metadata_props)
    fitted = healed.fitted_on[0]
    content = [f"content:{fitted.content}"] if fitted.content else []
    assert noted == {"fitted": sorted([fitted.sha256, *content])}
    for name in ("report.md", "report.html"):
        text = (out / name).read_text()
        assert "held out" in text
        assert "another domain" in text
        assert all(warning[:30] in text for warning in report.healing.warnings)
    _, heard = _walk(request)
    assert heard.reused == ["score", "plan", "healing", "export", "prune", "measure"]
    report, heard = _walk(_request(checkpoint, out, drops=DropRequest(plan=bare)))
    assert heard.reused == ["score", "plan", "export"]
    assert report.healing is None
    assert not healing.exists()


@pytest.mark.parametrize("role", ["chosen_on", "fitted_on", "stopped_on", "heal"])
def test_what_a_plan_rests_on_is_not_judged_on(checkpoint: Path, tmp_path: Path, role: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the list of value " * 200)
    judged = CompareOptions(eval_text=str(text))
    if role == "heal":
        heal = HealOptions(calibration=(str(text),))
        with raises(ComparisonError, "same-text"):
            _walk(_request(checkpoint, tmp_path / "out", heal=heal, compare=judged))
        assert not (tmp_path / "out").exists()
        return
    for sha256, refused in ((sha256_file(text), True), ("0" * 64, False)):
        ref = CalibrationRef(source="own", samples=1, sequence_length=8, tokens=8, sha256=sha256)
        plan = PruningPlan(deletions=PLAN[2:], **{role: [ref]}).write(tmp_path / "plan.json")
        drops = DropRequest(plan=plan)
        request = _request(checkpoint, tmp_path / "out", drops=drops, compare=judged)
        with raises(ComparisonError, "same-text", "text.txt") if refused else nullcontext():
            refuse_deciding_text(Run(request, QUIET))


IDS = np.arange(3, 11, dtype=np.int64)[None]
DISTILL = HealOptions(
    kind="distill",
    tokens=40 * 64,
    step_tokens=64,
    sequence_length=16,
    learning_rate=0.01,
    samples=24,
)


@pytest.fixture(scope="module")
def distilled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("distilled") / "out"
    return out, _walk(_request(checkpoint, out, heal=DISTILL, checkpoint=True))[0]


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


def test_candidate_and_checkpoint_are_the_bare_cut_with_other_weights(
    distilled: Any, tmp_path: Path
) -> None:
    out, report = distilled
    plan = PruningPlan.read(out / "plan.json")
    prune_file(out / "baseline" / "model.onnx", tmp_path / "model.onnx", plan.deletions)
    assert kinds(out / "candidate" / "model.onnx") == kinds(tmp_path / "model.onnx")
    assert not np.allclose(logits(out / "candidate"), logits(tmp_path), atol=1e-3)
    assert PruneReport.read(out / "prune.json").verification.passed
    checks = [check for check in report.parity if "candidate" in check.name]
    assert checks
    assert all(check.passed for check in checks)
    import torch

    card = (distilled[0] / "checkpoint" / "README.md").read_text()
    plan = PruningPlan.read(distilled[0] / "healing" / "plan.json")
    assert tells(card, plan.changed_weights)
    loaded = load_pruned(distilled[0] / "checkpoint")
    with torch.inference_mode():
        wanted = loaded.model(torch.from_numpy(IDS)).logits.numpy()
    assert np.allclose(logits(distilled[0] / "candidate"), wanted, atol=1e-4)


def test_the_healed_plan_says_how_and_on_what(distilled: Any) -> None:
    out, report = distilled
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


def test_the_healed_plan_gives_the_same_candidate_and_cuts_no_graph_with_the_old_weights(
    distilled: Any, checkpoint: Path, tmp_path: Path
) -> None:
    given, out = distilled[0] / "healing" / "plan.json", tmp_path / "out"
    _walk(_request(checkpoint, out, drops=DropRequest(plan=given)))
    assert np.allclose(logits(out / "candidate"), logits(distilled[0] / "candidate"), atol=1e-6)
    with raises(PlanError, "changed-weights"):
        prune_file(out / "baseline" / "model.onnx", tmp_path / "cut.onnx", LoadedPlan.read(given))
    assert not (tmp_path / "cut.onnx").exists()
