"""Plans name their model, and are held against the one that they are to cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import exporter.cli as command_line
from exporter.artifacts import CalibrationRef, PlannedDeletion, PruningPlan, ReplacementsRef
from exporter.artifacts.plans import (
    MODEL_KEY,
    hold_against_model,
    note_texts,
    noted_texts,
    plan_drop,
)
from exporter.errors import PlanError
from tests.made_reports import full_importance
from tests.raising import raises
from tests.reading import Heard

OURS, OTHER = "a" * 64, "b" * 64
FITTED = ReplacementsRef(path="plan.safetensors", sha256="c" * 64)


def _plan(model: str | None, **changes: Any) -> PruningPlan:
    made_from = {} if model is None else {"model": model}
    deletions = [PlannedDeletion(layer=1, kind="mlp")]
    return PruningPlan(deletions=deletions, made_from=made_from, **changes)


def _said(plan: PruningPlan, sha256: str | None, **options: Any) -> list[str]:
    heard = Heard()
    hold_against_model(plan, sha256, model="tiny", progress=heard, **options)
    return heard.lines


def test_a_plan_by_scores_names_the_model_and_the_scores() -> None:
    report = full_importance(layers=3)
    assert plan_drop(report, attention=1).made_from == {"model": report.model.sha256}
    assert plan_drop(report, attention=1, importance_sha256="ab").made_from == {
        "model": report.model.sha256, "importance": "ab",
    }  # fmt: skip


@pytest.mark.parametrize(("meant", "sha256"), [(OURS, OURS), (None, OURS), (OURS, None)])
def test_the_same_model_or_one_that_is_not_told(meant: str | None, sha256: str | None) -> None:
    assert _said(_plan(meant), sha256) == []
    assert _said(_plan(meant, replacements=FITTED), sha256) == []


def test_a_bare_plan_of_another_model_is_warned_of() -> None:
    (line,) = _said(_plan(OTHER), OURS, path=Path("plan.json"))
    assert all(named in line for named in ("plan.json", OTHER[:12], "tiny", OURS[:12]))


def test_replacements_that_were_fitted_to_another_model_are_refused() -> None:
    with raises(PlanError, "another-model", OTHER[:12], OURS[:12]):
        _said(_plan(OTHER, replacements=FITTED), OURS)
    (line,) = _said(_plan(OTHER, replacements=FITTED), OURS, refits=True)
    assert "warning" in line


def test_prune_holds_a_plan_against_the_graphs_own_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from graph_passes.files.storage import load_model, save_model
    from tests.tiny_graphs import TinySpec, tiny_model

    model = tiny_model(TinySpec())
    model.metadata_props[MODEL_KEY] = OURS
    save_model(model, tmp_path / "model.onnx")
    for meant, warned in ((OURS, False), (OTHER, True)):
        plan, output = tmp_path / f"{meant[0]}.json", tmp_path / meant[0] / "model.onnx"
        _plan(meant).write(plan)
        call = ["prune", str(tmp_path / "model.onnx"), "-o", str(output), "--plan", str(plan)]
        assert command_line.run([*call, "--verify", "none"]) == 0
        printed = capsys.readouterr()
        assert (OTHER[:12] in printed.out + printed.err) is warned
        assert load_model(output).metadata_props[MODEL_KEY] == OURS


def test_a_graph_notes_the_texts_of_all_plans_that_cut_it() -> None:
    def text(digit: str) -> CalibrationRef:
        return CalibrationRef(
            source=f"/home/me/{digit}", samples=1, sequence_length=2, tokens=2, sha256=digit * 64
        )

    metadata: dict[str, str] = {}
    note_texts(metadata, _plan(None, judged_on=[text("1")]).decided)
    assert metadata == {}
    note_texts(metadata, _plan(None, chosen_on=[text("2"), text("1")]).decided)
    note_texts(metadata, _plan(None, chosen_on=[text("2")], fitted_on=[text("3")]).decided)
    assert noted_texts(metadata) == {"chosen": ["1" * 64, "2" * 64], "fitted": ["3" * 64]}
    assert "home" not in str(metadata)
    assert noted_texts(dict.fromkeys(metadata, "[[")) == {}
