"""From a plan with a safetensors file to a pruned ONNX file, and what is refused on the way."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

import exporter.cli as command_line
from exporter.artifacts import PlannedDeletion, PruneReport, PruningPlan, ReplacementsRef
from exporter.artifacts.loaded_plan import LoadedPlan, Replacements, read_replacements
from exporter.artifacts.plans import read_plan
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.errors import PlanError, UnsafePlanError, UsageError, VerificationError
from exporter.files import sha256_file
from graph_passes import ReplacementTensors, SublayerRef, testing
from graph_passes.files import storage
from graph_passes.files.storage import load_model, save_model
from tests.raising import raises, tells
from tests.reading import all_data_of, data_of
from tests.tiny_graphs import TinySpec, tiny_model

RNG = np.random.default_rng(0)
TENSORS: dict[str, Any] = {
    "attention.1.weight": RNG.standard_normal((8, 8)).astype(ml_dtypes.bfloat16),
    "attention.1.bias": RNG.standard_normal(8).astype(np.float16),
    "mlp.0.bias": RNG.standard_normal(8).astype(np.float32),
}
DELETIONS = [
    PlannedDeletion(layer=1, kind="attention", replacement="linear"),
    PlannedDeletion(layer=0, kind="mlp", replacement="bias"),
    PlannedDeletion(layer=2, kind="mlp"),
]


def write_plan(
    folder: Path,
    tensors: dict[str, Any] = TENSORS,
    deletions: list[PlannedDeletion] = DELETIONS,
    **reference: str,
) -> Path:
    """``plan.json`` and ``numbers.safetensors``; ``reference`` changes what the plan says of it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "numbers.safetensors")
    known = {"path": "numbers.safetensors", "sha256": sha256_file(folder / "numbers.safetensors")}
    plan = PruningPlan(deletions=deletions, replacements=ReplacementsRef(**{**known, **reference}))
    return plan.write(folder / "plan.json")


def read(plan_path: Path) -> Replacements:
    replacements = read_replacements(read_plan(plan_path), plan_path)
    assert replacements is not None
    return replacements


def cut(source: Path, target: Path, numbers: Replacements, **options: Any) -> PruneReport:
    report = prune_file(source, target, LoadedPlan.of(DELETIONS, numbers), CutOptions(**options))
    assert report.verification.passed
    return report


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storage, "_INLINE_BYTES", 32)  # tiny weights go to the data file too
    path = tmp_path / "source" / "model.onnx"
    save_model(tiny_model(TinySpec()), path)
    return path


def test_the_plan_in_the_readme_is_a_whole_one(tmp_path: Path) -> None:
    readme = Path(__file__).parents[3] / "graph_passes" / "README.md"
    (example,) = re.findall(r"```json\n(.*?)```", readme.read_text("utf-8"), flags=re.DOTALL)
    (tmp_path / "plan.json").write_text(example)
    plan = read_plan(tmp_path / "plan.json")
    assert plan.describe() == "attention 25 (linear)"
    assert plan.replacements is not None


def test_a_plan_is_carried_out_from_the_command_line(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan, target = write_plan(tmp_path / "plan"), tmp_path / "out" / "m.onnx"
    assert command_line.run(["prune", str(source), "-o", str(target), "--plan", str(plan)]) == 0
    text = "".join(capfd.readouterr())
    assert tells(text, 3)
    assert tells(text, 2)
    report = PruneReport.read(tmp_path / "out" / "prune.json")
    assert report.verification.passed
    assert report.made_from["replacements"] == read(plan).sha256
    text = {(e.kind, e.layer): (e.replacement, e.parameters_added) for e in report.deleted}
    assert text == {
        ("mlp", 0): ("bias", 8), ("attention", 1): ("linear", 72), ("mlp", 2): ("none", 0),
    }  # fmt: skip
    removed = sum(entry.parameters_removed for entry in report.deleted)
    assert report.before.parameters - removed + 80 == report.after.parameters
    recorded = json.loads(load_model(target).metadata_props["depthcut.plan"])
    assert [entry["replacement"] for entry in recorded] == ["bias", "linear", "none"]
    onnx.checker.check_model(str(target), full_check=True)


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_shared_weights_stay_where_they_are(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(storage, "_MOST_INLINE_BYTES", limit)
    before = data_of(source).read_bytes()
    target = source.with_name("m.onnx")
    cut(source, target, read(write_plan(tmp_path / "plan")), weights="share")
    assert [own.stat().st_size for own in all_data_of(target)] == [8 * 8 * 4] * (limit == 0)
    assert data_of(source).read_bytes() == before
    onnx.checker.check_model(str(target), full_check=True)
    again = prune_file(source, target, DELETIONS[2:], CutOptions(weights="share"))
    assert again.verification.passed
    assert all_data_of(target) == []


def test_a_graph_that_holds_its_weights_shares_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So its result may stand in any folder, also with a data file of its own."""
    monkeypatch.setattr(storage, "_MOST_INLINE_BYTES", 0)
    monkeypatch.setattr(storage, "_INLINE_BYTES", 32)
    source, target = tmp_path / "source" / "model.onnx", tmp_path / "elsewhere" / "m.onnx"
    source.parent.mkdir()
    source.write_bytes(ir.to_proto(tiny_model(TinySpec())).SerializeToString())
    cut(source, target, read(write_plan(tmp_path / "plan")), weights="share")
    assert data_of(target).stat().st_size == 8 * 8 * 4


def test_the_numbers_can_not_be_the_target(source: Path, tmp_path: Path) -> None:
    result = read(write_plan(tmp_path))
    with raises(UsageError, "overwrites-input", result.path):
        cut(source, result.path, result)


def test_verification_catches_other_numbers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = read(write_plan(tmp_path / "plan"))
    right = testing.masked_model

    def wrong(model: ir.Model, deletions: Any, given: Any) -> ir.Model:
        ref = SublayerRef(1, "attention")
        turned = np.ascontiguousarray(given[ref].weight.numpy().T)
        return right(model, deletions, {**given, ref: ReplacementTensors(given[ref].bias, turned)})

    monkeypatch.setattr(testing, "masked_model", wrong)
    with raises(VerificationError, "wrong-results"):
        cut(source, tmp_path / "out" / "m.onnx", result)
    assert not (tmp_path / "out").exists()


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in TENSORS.items() if key not in keys}


WRONG: dict[tuple[str, str], dict[str, Any]] = {
    ("numbers-missing", "attention.1.bias"): without("attention.1.bias"),
    ("other-numbers", "mlp.1.bias"): TENSORS | {"mlp.1.bias": TENSORS["mlp.0.bias"]},
    ("other-numbers", "mlp.2.bias"): TENSORS | {"mlp.2.bias": TENSORS["mlp.0.bias"]},
    ("other-numbers", "mlp.0.weight"): TENSORS | {"mlp.0.weight": TENSORS["attention.1.weight"]},
    ("other-numbers", "attn.1.bias"): TENSORS | {"attn.1.bias": TENSORS["mlp.0.bias"]},
    ("other-numbers", "mlp.00.bias"): TENSORS | {"mlp.00.bias": TENSORS["mlp.0.bias"]},
    ("wrong-dtype", "mlp.0.bias"): TENSORS | {"mlp.0.bias": np.ones(8, np.int64)},
}


@pytest.mark.parametrize(("code", "key"), WRONG)
def test_wrong_keys_are_refused(code: str, key: str, tmp_path: Path) -> None:
    wrong = WRONG[code, key]
    tensors = {k: v.astype(np.float32) if v.dtype == float else v for k, v in wrong.items()}
    with raises(PlanError, code, key):
        read(write_plan(tmp_path, tensors))


def test_a_file_out_of_the_plans_folder_is_refused(tmp_path: Path) -> None:
    write_plan(tmp_path)
    numbers = tmp_path / "numbers.safetensors"
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "link.safetensors").symlink_to(numbers)
    for path in ("../numbers.safetensors", str(numbers), "link.safetensors"):
        with raises(UnsafePlanError, "", "$.replacements.path", path):
            read(write_plan(tmp_path / "plan", path=path))


@pytest.mark.parametrize(
    ("reference", "code", "named"),
    [
        ({"sha256": "0" * 64}, "other-numbers", "numbers.safetensors"),
        ({"path": "other.safetensors"}, "file-missing", "other.safetensors"),
        ({"path": "broken.safetensors"}, "other-numbers", "broken.safetensors"),
        ({"path": "empty.safetensors"}, "other-numbers", "empty.safetensors"),
    ],
)
def test_another_file_than_the_plans_is_refused(
    tmp_path: Path, reference: dict[str, str], code: str, named: str
) -> None:
    broken, empty = (tmp_path / f"{name}.safetensors" for name in ("broken", "empty"))
    broken.write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    empty.touch()
    os.truncate(empty, 1 << 40)  # which is not hashed
    if named == "broken.safetensors":
        reference = {**reference, "sha256": sha256_file(broken)}
    with raises(PlanError, code, tmp_path / named):
        read(write_plan(tmp_path, **reference))


def test_a_plan_without_a_file_replaces_nothing(tmp_path: Path) -> None:
    plan = PruningPlan(deletions=DELETIONS)
    with raises(PlanError, "other-numbers", "attention 1", "linear"):
        read_replacements(plan, tmp_path / "plan.json")
    assert read_replacements(PruningPlan(deletions=DELETIONS[2:]), tmp_path / "plan.json") is None


@pytest.mark.parametrize("name", ["report.json", "baseline/numbers.safetensors", "healing"])
def test_an_export_refuses_numbers_that_are_named_like_a_result(name: str, tmp_path: Path) -> None:
    from exporter.pipeline.request import DropRequest, ExportRequest
    from exporter.pipeline.road import refuse_foreign_results

    def run(path: str) -> Any:
        known = ReplacementsRef(path=path, sha256="0" * 64)
        plan = PruningPlan(deletions=DELETIONS, replacements=known)
        drops = DropRequest(plan=Path("plan.json"))
        request = ExportRequest(source="m", out=tmp_path, drops=drops)
        given = SimpleNamespace(plan=plan, path="plan.json")
        return SimpleNamespace(request=request, given_plan=given)

    with raises(PlanError, "same-file", "$.replacements.path", name.partition("/")[0]):
        refuse_foreign_results(run(name))
    refuse_foreign_results(run("numbers/baseline.safetensors"))
