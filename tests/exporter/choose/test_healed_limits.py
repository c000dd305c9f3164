"""The largest cut of a tiny model that keeps limits on quality once it is healed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from scipy import stats

from exporter.artifacts import CalibrationRef, HealedText, PruningPlan
from exporter.artifacts.healing import HealedFigure
from exporter.artifacts.store import FOLDER
from exporter.errors import CalibrationError, PlanError, UnmetGoalError
from exporter.heal.options import HealOptions
from graph_passes.types import SublayerKind, SublayerRef
from tests.exporter.made_plans import Planner, made_planner
from tests.raising import raises
from tests.tiny_models import write_words

pytestmark = pytest.mark.torch
pytest.importorskip("torch")

from exporter.choose.budgets.budget import (  # noqa: E402
    Budget,
    Floors,
    SearchOptions,
)
from exporter.choose.budgets.limits import QualityLimits  # noqa: E402
from exporter.choose.budgets.options import Option, PlanCandidate  # noqa: E402
from exporter.choose.budgets.trial_runs import (  # noqa: E402
    JUDGED,
    Candidate,
    TrialRuns,
    ever_larger,
    is_lost,
    largest_within,
)
from exporter.choose.costs.table import RequestShape  # noqa: E402
from exporter.heal.distill.training import Trainer  # noqa: E402
from exporter.heal.texts import healing_texts  # noqa: E402
from exporter.models.ablation.damage import Damage  # noqa: E402
from exporter.score.options import ScoreOptions  # noqa: E402
from exporter.score.scoring import score  # noqa: E402
from tests.made_tables import made_table  # noqa: E402
from tests.tiny_models import tiny_loaded, tiny_tokenizer  # noqa: E402

NEVER = Floors(None, 0.99999)
FOLD: dict[str, Any] = {"kind": "fold", "samples": 24, "sequence_length": 16}
DISTILL = {"kind": "distill", "tokens": 12 * 64, "step_tokens": 64, "time_s": 3600.0}


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tiny_loaded("llama", tiny_tokenizer())


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("texts")
    return [write_words(folder / f"{seed}.txt", 2000, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def report(loaded: Any, texts: list[str]) -> Any:
    return score(loaded, ScoreOptions(calibration=(texts[0],), samples=24, sequence_length=16))


@pytest.fixture
def planner(loaded: Any, texts: list[str], report: Any, tmp_path: Path) -> Any:
    def made(
        budget: Budget, costs: Any = None, stopwatch: Any = None, protect: Any = (), **heal: Any
    ) -> Planner:
        return made_planner(
            loaded, report, tmp_path / FOLDER / "work", budget,
            SearchOptions(search="greedy", shortlist=0, tokens=256, protect=protect),
            heal=HealOptions(**{**FOLD, "check_text": texts[1], **heal}),
            costs=costs, stopwatch=stopwatch,
        )  # fmt: skip

    return made


@pytest.fixture
def runs_of(loaded: Any, texts: list[str], tmp_path: Path) -> Any:
    """The trials of some options, on both texts."""

    def made(floors: Floors, work: str = "work", **options: Any) -> TrialRuns:
        given = {**FOLD, "check_text": texts[1], "calibration": (texts[0],), **options}
        return TrialRuns(loaded, HealOptions(**given), floors, tmp_path / FOLDER / work)

    return made


def test_the_largest_cut_within_the_limits_is_taken_and_says_by_what(planner: Any) -> None:
    result = planner(Budget(floors=Floors(0.5))).plan()
    plan, tried = result.plan, result.plan.tried[-1]
    assert (tried.holds, tried.healed_by) == (True, "fold")
    assert tried.deletions == plan.deletions
    assert tried.changed_weights == plan.changed_weights
    high = tried.healed["log_perplexity_increase_high"]
    assert plan.predicted["log_perplexity_increase"] <= high <= math.log(1.5)
    assert plan.predicted["parameters"] < plan.predicted["parameters_before"]
    assert plan.budget["max_perplexity_increase"] == 0.5
    assert result.weights
    assert plan.predicted_on == "checked"
    roles = plan.roles
    assert {*roles} == {"chosen", "fitted", "stopped", "judged"}
    own = {ref.ids_sha256 for ref in roles["judged"] if ref in roles["stopped"]}
    assert own, "the text that was held against the limits"
    assert not own & {ref.ids_sha256 for name in ("chosen", "fitted") for ref in roles[name]}


AT = RequestShape(prompt=8, new=4)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_the_largest_cut_is_that_of_a_requests_time_where_one_is_named(
    planner: Any, kind: SublayerKind
) -> None:
    kinds: dict[str, float] = {"attention": 0.0, "mlp": 0.0, kind: 20.0}
    saved = {(n, key): {"none": ms} for n in range(2) for key, ms in kinds.items()}
    plan = planner(Budget(floors=Floors(0.5), at=AT), made_table(saved, at=AT)).plan().plan
    assert {deletion.kind for deletion in plan.deletions} == {kind}
    assert plan.predicted["speedup"] == pytest.approx(100 / (100 - 20 * len(plan.deletions)))
    assert plan.budget["at"] == str(AT)


def test_the_gentlest_sublayer_is_tried_where_all_that_saves_more_costs_too_much(
    planner: Any,
) -> None:
    counted = planner(Budget(floors=Floors(0.5)))
    gentle, _ = counted.search.gentlest(counted.used_up)
    (name,) = gentle.choices

    def candidates(saved_ms: float, of_the_gentlest: float) -> Any:
        saved = {item: {"none": saved_ms} for item in counted.sizes.sublayers}
        table = made_table(saved | {name: {"none": of_the_gentlest}}, at=AT)
        return ever_larger(planner(Budget(floors=Floors(0.5), at=AT), table))

    first, second, *_ = candidates(20.0, 0.01)
    assert [*first[0].choices] == [name]
    assert name not in second[0].choices
    # Where what saves most also costs least, nothing is put before it.
    even = candidates(10.0, 10.0)
    assert [len(cut.choices) for cut, _ in even] == [*range(1, len(even) + 1)]


def test_the_text_that_judges_has_neither_chosen_nor_fitted_nor_stopped(
    loaded: Any, runs_of: Any
) -> None:
    options = runs_of(Floors(0.5))._options
    result = healing_texts(loaded, options, judging=JUDGED)
    choosing, judging, fitted = (
        {tuple(row) for row in text.input_ids.tolist()} for text in (*result.halves, result.fitting)
    )
    assert 2 <= len(choosing) <= 4  # documents stay whole
    assert len(judging) >= JUDGED
    assert not choosing & judging
    assert not fitted & (choosing | judging)
    usual = healing_texts(loaded, options).halves
    assert all(2 <= len(half.input_ids) <= 6 for half in usual)


def test_a_number_that_costs_too_much_is_refused_with_what_is_in_reach(planner: Any) -> None:
    result = planner(Budget(attention=1, floors=Floors(0.5))).plan()
    assert [deletion.kind for deletion in result.plan.deletions] == ["attention"]
    with raises(UnmetGoalError, "goals-beyond-limits", "1 attention dropped"):
        planner(Budget(attention=1, floors=NEVER)).plan()
    with raises(UnmetGoalError, "nothing-within-limits"):
        planner(Budget(floors=NEVER)).plan()
    with raises(PlanError, "nothing-to-drop"):
        planner(Budget(floors=NEVER), protect=("attention:0,1,2", "mlp:0,1,2")).plan()


@pytest.mark.parametrize(
    ("floors", "budget", "code", "time_s"),
    [
        (NEVER, {"attention": 1}, "goals-beyond-limits", None),
        (NEVER, {}, "nothing-within-limits", None),
        (NEVER, {"attention": 1}, "", 60.0),  # so much is asked for
        (Floors(0.5), {"attention": 1}, "", None),
    ],
)
def test_a_cut_that_no_healing_could_save_is_refused_before_any(
    planner: Any, monkeypatch: pytest.MonkeyPatch, floors: Floors, budget: Any, code: str,
    time_s: float | None,
) -> None:  # fmt: skip
    healing, is_healed = Mock(side_effect=KeyboardInterrupt), not code
    monkeypatch.setattr(TrialRuns, "run", healing)
    with pytest.raises(KeyboardInterrupt if is_healed else UnmetGoalError) as caught:
        planner(Budget(**budget, floors=floors), **DISTILL | {"time_s": time_s}).plan()
    assert healing.called == is_healed
    assert getattr(caught.value, "code", "") == code


def test_an_interrupted_search_goes_on_from_the_cuts_that_it_has_healed(
    planner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(floors=Floors(0.5))
    first = planner(budget, **DISTILL).plan().plan
    assert first.tried[0].training_seconds > 0
    monkeypatch.setattr(Trainer, "run", Mock(side_effect=KeyboardInterrupt))
    again = planner(budget, **DISTILL).plan()
    assert again.plan.deletions == first.deletions
    assert again.plan.tried == first.tried
    assert len(again.weights) == again.plan.changed_weights == first.changed_weights > 0
    with pytest.raises(KeyboardInterrupt):
        planner(budget, **DISTILL | {"tokens": 64 * 64}).plan()


@pytest.mark.parametrize(
    ("time_s", "spent_s", "tried"),
    [(3600.0, 0.0, 2), (0.001, 0.0, 1), (3600.0, 3599.0, 2)],  # half is left for healing
)
def test_no_cut_is_begun_that_can_not_be_finished_in_time(
    runs_of: Any, time_s: float, spent_s: float, tried: int
) -> None:
    never = Floors(1e-9)
    runs = runs_of(never, **DISTILL | {"kind": "auto", "time_s": time_s})
    runs.begin(spent_s)
    cuts = [cut_of(layer, 1e-10 * (1 + layer)) for layer in range(2)]
    limits = QualityLimits(never)
    ladder = largest_within(cuts, limits, runs, lambda cut: PruningPlan(deletions=cut.deletions))
    assert [rung.number for rung in ladder.tried] == [1, 0][:tried]
    assert not any(rung.holds for rung in ladder.tried)


@pytest.mark.parametrize(("words", "judged"), [(200, 1), (600, 2)])
def test_no_limit_is_held_by_a_single_sample(
    words: int, judged: int, runs_of: Any, tmp_path: Path
) -> None:
    text = write_words(tmp_path / "text.txt", words, seed=0)
    runs = runs_of(Floors(0.5), calibration=(text,), sequence_length=24)
    if judged > 1:
        assert len(runs.texts.halves[1].input_ids) >= judged
        return
    with raises(CalibrationError, "too-few-samples"):
        _ = runs.texts


def cut_of(layer: int, rise: float) -> Candidate:
    """The MLPs up to a layer, with what they are said to cost."""
    options = (Option((SublayerRef(number, "mlp"),)) for number in range(layer + 1))
    ones = np.ones(2)
    damage = Damage(ones, rise * ones, ones, rise * ones, 0 * ones)
    return PlanCandidate(tuple(options)), damage


def measured(
    rise: float, error: float | None, samples: int, degrees: float | None = None
) -> HealedText:
    free = samples - 1 if degrees is None else degrees
    reach = None if error is None else error * float(stats.t.ppf(0.975, free))
    ci95 = None if reach is None else (rise - reach, rise + reach)
    figures = {
        "log_perplexity_increase": HealedFigure(dropped=rise, healed=rise, ci95=ci95),
        "kl": HealedFigure(dropped=rise, healed=rise),
        "top1_agreement": HealedFigure(dropped=0.5, healed=0.5),
    }
    ref = CalibrationRef(
        source="t", samples=samples, sequence_length=8, tokens=8 * samples, sha256="0" * 64
    )
    return HealedText(
        role="calibration", text=ref, figures=figures, gain=0.0, gain_std_error=None,
        degrees=degrees, perplexities=(1.0, 1.0, 1.0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rise", "error", "samples", "lost"),
    [
        (0.06, 0.005, 4, True),  # Student's t of 3 degrees: from 0.044 on
        (0.06, 0.02, 4, False),  # from -0.004 on
        (0.06, 0.02, 16, False),
        (0.065, 0.02, 16, True),
        (0.06, 0.005, 3, False),
        (0.06, None, 1, False),
        (0.01, 0.001, 16, False),
    ],
)
def test_a_cut_is_given_up_where_all_of_its_interval_is_beyond_a_limit(
    rise: float, error: float | None, samples: int, lost: bool
) -> None:
    assert is_lost(measured(rise, error, samples), Floors(0.02)) is lost
    assert not is_lost(measured(rise, error, samples), Floors(0.02), 10**6), "if asked so often"
    assert not is_lost(measured(rise, error, samples), Floors(None, 0.99))


def test_cuts_within_their_limit_are_seldom_given_up_however_often_they_are_looked_at() -> None:
    """Looked at after every four of 24 samples; without a correction 15 in 100 are given up."""
    rng, limit, given_up = np.random.default_rng(0), math.log1p(0.02), [0, 0]
    for rises in rng.normal(limit, 0.03, (500, 24)):
        seen = [
            measured(rises[:n].mean(), rises[:n].std(ddof=1) / math.sqrt(n), n)
            for n in range(4, 25, 4)
        ]
        for place, looks in enumerate((6, 1)):
            given_up[place] += any(is_lost(item, Floors(0.02), looks) for item in seen)
    assert given_up[0] / 500 < 0.03
    assert given_up[1] / 500 > 0.06
