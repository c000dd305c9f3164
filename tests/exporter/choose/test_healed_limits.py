"""The largest cut of a tiny model that keeps limits on quality once it is healed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts.ledger import FOLDER
from exporter.errors import UnmetGoalError
from exporter.heal.options import HealOptions
from tests.raising import raises

pytestmark = pytest.mark.torch
pytest.importorskip("torch")

from tiny_families import tiny_loaded, tiny_tokenizer  # noqa: E402

from exporter.choose.budgets.budget import Budget, Floors  # noqa: E402
from exporter.choose.budgets.inputs import Workplace  # noqa: E402
from exporter.choose.budgets.planner import Planner  # noqa: E402
from exporter.choose.budgets.settings import PlanSettings  # noqa: E402
from exporter.choose.budgets.trial_runs import JUDGED, TrialRuns  # noqa: E402
from exporter.choose.selection.search_options import SearchOptions  # noqa: E402
from exporter.heal.automatic import USUAL_TIME_S  # noqa: E402
from exporter.heal.distill.training import Trainer  # noqa: E402
from exporter.heal.texts import healing_texts  # noqa: E402
from exporter.score import ScoreOptions, score  # noqa: E402

NEVER = Floors(None, 0.99999)
FOLD: dict[str, Any] = {"kind": "fold", "samples": 24, "sequence_length": 16}
DISTILL = {"kind": "distill", "tokens": 12 * 64, "step_tokens": 64, "time_s": 60.0}


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tiny_loaded("llama", tiny_tokenizer())


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, random = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    paths = [folder / "own.txt", folder / "other.txt"]
    for path in paths:
        path.write_text(" ".join(f"w{n}" for n in random.integers(0, 60, 2000)))
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def report(loaded: Any, texts: list[str]) -> Any:
    return score(loaded, ScoreOptions(calibration=(texts[0],), samples=24, sequence_length=16))


@pytest.fixture
def planner(loaded: Any, texts: list[str], report: Any, tmp_path: Path) -> Any:
    def made(budget: Budget, **heal: Any) -> Planner:
        return Planner(
            report,
            lambda: loaded,
            budget,
            PlanSettings(
                search=SearchOptions(search="greedy", shortlist=0, tokens=256),
                heal=HealOptions(**{**FOLD, "check_text": texts[1], **heal}),
            ),
            work=Workplace(tmp_path / FOLDER / "work"),
            importance_sha256="a" * 64,
        )

    return made


def test_the_largest_cut_within_the_limits_is_taken_and_says_by_what(planner: Any) -> None:
    found = planner(Budget(floors=Floors(0.5))).plan()
    plan = found.plan
    assert plan.tried[-1].holds
    assert plan.tried[-1].deletions == plan.deletions
    assert plan.tried[-1].healed_by == "fold"
    high = plan.tried[-1].healed["log_perplexity_increase_high"]
    assert plan.predicted["log_perplexity_increase"] <= high <= math.log(1.5)
    assert plan.predicted["parameters"] < plan.predicted["parameters_before"]
    assert plan.budget["max_perplexity_increase"] == 0.5
    assert found.weights
    assert plan.predicted_on == "checked"
    roles = plan.roles
    assert {*roles} == {"chosen", "fitted", "stopped", "judged"}
    own = {ref.ids_sha256 for ref in roles["judged"] if ref in roles["stopped"]}
    assert own, "the text that was held against the limits"
    assert not own & {ref.ids_sha256 for name in ("chosen", "fitted") for ref in roles[name]}


def test_the_text_that_judges_has_neither_chosen_nor_fitted_nor_stopped(
    loaded: Any, texts: list[str]
) -> None:
    options = HealOptions(calibration=(texts[0],), **{**FOLD, "check_text": texts[1]})
    found = healing_texts(loaded, options, judged=JUDGED)
    rows = [{tuple(row) for row in text.input_ids.tolist()} for text in found.halves]
    assert (len(rows[0]), len(rows[1])) == (3, 3 + JUDGED)
    assert not rows[0] & rows[1]
    fitted = {tuple(row) for row in found.fitting.input_ids.tolist()}
    assert not fitted & (rows[0] | rows[1])
    usual = healing_texts(loaded, options).halves
    assert [len(half.input_ids) for half in usual] == [3, 3]


def test_nothing_is_cut_where_no_cut_keeps_the_limits(planner: Any) -> None:
    with raises(UnmetGoalError, "nothing-within-limits"):
        planner(Budget(floors=NEVER)).plan()


def test_a_number_that_costs_too_much_is_refused_with_what_is_in_reach(planner: Any) -> None:
    found = planner(Budget(attention=1, floors=Floors(0.5))).plan()
    assert [deletion.kind for deletion in found.plan.deletions] == ["attention"]
    with raises(UnmetGoalError, "goals-beyond-limits", "1 attention dropped"):
        planner(Budget(attention=1, floors=NEVER)).plan()


def test_an_interrupted_search_goes_on_from_the_cuts_that_it_has_healed(
    planner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(floors=Floors(0.5))
    first = planner(budget, **DISTILL).plan().plan
    assert first.tried[0].training_seconds > 0

    def failing(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "run", failing)
    again = planner(budget, **DISTILL).plan()
    assert again.plan.deletions == first.deletions
    assert again.plan.tried == first.tried
    assert len(again.weights) == again.plan.changed_weights == first.changed_weights > 0
    with pytest.raises(KeyboardInterrupt):
        planner(budget, **DISTILL | {"tokens": 64 * 64}).plan()


def test_trainings_share_their_time(loaded: Any, texts: list[str], tmp_path: Path) -> None:
    runs = TrialRuns(loaded, HealOptions(kind="distill", time_s=60.0), Floors(0.5), tmp_path)
    assert runs.first.time_s == 30.0
    unlimited = TrialRuns(loaded, HealOptions(kind="distill"), Floors(0.5), tmp_path)
    assert unlimited.first.time_s == USUAL_TIME_S / 2
    assert TrialRuns(loaded, HealOptions(kind="fold"), Floors(0.5), tmp_path).first.time_s is None
