"""`depthcut export --plan` with replacements: they go along, are checked, and are told of."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import _request, _walk, checkpoint, own_cache

from exporter.artifacts import CalibrationRef, HealingReport, ModelRef, PruneReport, PruningPlan
from exporter.artifacts.plans import noted_texts
from exporter.errors import PlanError
from exporter.pipeline.request import DropRequest
from graph_passes.files.storage import load_model
from tests.made_reports import full_report
from tests.raising import raises
from tests.tiny_models import planned, random_replacements

pytestmark = pytest.mark.torch

__all__ = ["checkpoint", "own_cache"]  # fixtures
PLAN = planned(("attention", 1, "linear"), ("mlp", 2, "bias"), ("mlp", 0, "none"))
HIDDEN = 32


def write_healed(
    path: Path, *, seed: int = 0, hidden: int = HIDDEN, report: Any = None, model: str | None = None
) -> Path:
    """A plan with random numbers."""
    import torch

    from exporter.heal.plan_file import write_healed_plan
    from exporter.models.ablation.branch_replacements import BranchReplacement
    from graph_passes.replacements import array_of

    given = random_replacements(hidden, PLAN, seed=seed)
    branch_replacements = {
        (ref.layer, ref.kind): BranchReplacement(
            torch.tensor(array_of(one.bias)),
            tuple(torch.tensor(array_of(item)) for item in one.maps.values()),
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


def test_a_healing_that_nobody_told_of_is_not_known(walked: Any) -> None:
    out, _, report = walked
    assert report.healing is None
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
    from exporter.heal.plan_file import report_of

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


def test_numbers_of_another_width_are_refused_before_the_export(
    checkpoint: Path, tmp_path: Path
) -> None:
    plan = write_healed(tmp_path / "wide" / "wide.json", hidden=48)
    request = _request(checkpoint, tmp_path / "out", drops=DropRequest(plan=plan))
    with raises(PlanError, "wrong-shape", 48, 32):
        _walk(request)
    assert not (tmp_path / "out" / "baseline").exists()


def test_numbers_of_another_model_are_refused_before_the_export(
    walked: Any, checkpoint: Path, tmp_path: Path
) -> None:
    from exporter.artifacts import ImportanceReport
    from exporter.artifacts.plans import MODEL_KEY

    ours = ImportanceReport.read(walked[0] / "importance.json").model.sha256
    for arm in ("baseline", "candidate"):
        assert load_model(walked[0] / arm / "model.onnx").metadata_props[MODEL_KEY] == ours
    plan = write_healed(tmp_path / "mine" / "healed.json", model="f" * 64)
    request = _request(checkpoint, tmp_path / "out", drops=DropRequest(plan=plan))
    with raises(PlanError, "another-model", "ffffffffffff"):
        _walk(request)
    assert not (tmp_path / "out" / "baseline").exists()


def test_export_heals_on_the_road_and_tells_what_it_gained(
    walked: Any, checkpoint: Path, tmp_path: Path
) -> None:
    from exporter.files import sha256_file
    from exporter.heal.options import HealOptions

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


def test_what_is_fitted_on_is_not_judged_on(checkpoint: Path, tmp_path: Path) -> None:
    from exporter.compare.options import CompareOptions
    from exporter.errors import ComparisonError
    from exporter.heal.options import HealOptions

    text = tmp_path / "text.txt"
    text.write_text("the list of value " * 200)
    request = _request(
        checkpoint,
        tmp_path / "out",
        heal=HealOptions(calibration=(str(text),)),
        compare=CompareOptions(eval_text=str(text)),
    )
    with raises(ComparisonError, "same-text"):
        _walk(request)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("role", ["chosen_on", "fitted_on", "stopped_on"])
def test_what_a_given_plan_rests_on_is_not_judged_on(
    checkpoint: Path, tmp_path: Path, role: str
) -> None:
    from exporter.compare.options import CompareOptions
    from exporter.errors import ComparisonError
    from exporter.files import sha256_file
    from exporter.pipeline.refusals import refuse_bad_options

    text = tmp_path / "text.txt"
    text.write_text("the list of value " * 200)
    for sha256, refused in ((sha256_file(text), True), ("0" * 64, False)):
        ref = CalibrationRef(source="own", samples=1, sequence_length=8, tokens=8, sha256=sha256)
        plan = PruningPlan(deletions=PLAN[2:], **{role: [ref]}).write(tmp_path / "plan.json")
        request = _request(
            checkpoint,
            tmp_path / "out",
            drops=DropRequest(plan=plan),
            compare=CompareOptions(eval_text=str(text)),
        )
        with raises(ComparisonError, "same-text", "text.txt") if refused else nullcontext():
            refuse_bad_options(request)
