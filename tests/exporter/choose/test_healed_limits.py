"""The largest cut of a tiny model that keeps limits on quality once it is healed."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import (
    CalibrationRef,
    HealedText,
    PlannedDeletion,
    PruningPlan,
    TriedCut,
)
from exporter.artifacts.healing import AnswerDamage
from exporter.artifacts.ledger import FOLDER
from exporter.errors import CostError, PlanError, UndecidedGoalError, UnmetGoalError
from exporter.heal.options import HealOptions
from graph_passes.types import SublayerKind, SublayerRef
from tests.raising import raises

pytestmark = pytest.mark.torch
pytest.importorskip("torch")

from cost_tables import made_table  # noqa: E402
from tiny_families import tiny_loaded, tiny_tokenizer  # noqa: E402

from exporter.choose.budgets.budget import Budget, Floors  # noqa: E402
from exporter.choose.budgets.candidates import PlanCandidate, QualityCheck  # noqa: E402
from exporter.choose.budgets.healed_limits import (  # noqa: E402
    Candidate,
    largest_within,
    refuse_all,
)
from exporter.choose.budgets.inputs import Workplace  # noqa: E402
from exporter.choose.budgets.judges import Judges  # noqa: E402
from exporter.choose.budgets.ladder import ENDS, HIGH, LOW, SAME, rung_of  # noqa: E402
from exporter.choose.budgets.planner import Planner  # noqa: E402
from exporter.choose.budgets.settings import PlanSettings  # noqa: E402
from exporter.choose.budgets.trial_figures import figures_of, is_lost  # noqa: E402
from exporter.choose.budgets.trial_runs import JUDGED, TrialRuns  # noqa: E402
from exporter.choose.costs.request_shape import RequestShape  # noqa: E402
from exporter.choose.selection.options import Option  # noqa: E402
from exporter.choose.selection.search_options import SearchOptions  # noqa: E402
from exporter.heal.automatic import USUAL_TIME_S  # noqa: E402
from exporter.heal.distill.training import Trainer  # noqa: E402
from exporter.heal.domains import _told  # noqa: E402
from exporter.heal.texts import healing_texts  # noqa: E402
from exporter.models.ablation.damage import SIMILARITY, ClassDamage, Damage  # noqa: E402
from exporter.models.texts.calibration import CalibrationText  # noqa: E402
from exporter.score import ScoreOptions, score  # noqa: E402

NEVER = Floors(None, 0.99999)
FOLD: dict[str, Any] = {"kind": "fold", "samples": 24, "sequence_length": 16}
DISTILL = {"kind": "distill", "tokens": 12 * 64, "step_tokens": 64, "time_s": 3600.0}


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
    def made(budget: Budget, costs: Any = None, stopwatch: Any = None, **heal: Any) -> Planner:
        return Planner(
            report,
            lambda: loaded,
            budget,
            PlanSettings(
                search=SearchOptions(search="greedy", shortlist=0, tokens=256),
                heal=HealOptions(**{**FOLD, "check_text": texts[1], **heal}),
            ),
            work=Workplace(tmp_path / FOLDER / "work"),
            costs=costs,
            stopwatch=stopwatch,
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


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_the_largest_cut_is_that_of_a_requests_time_where_one_is_named(
    planner: Any, kind: SublayerKind
) -> None:
    at = RequestShape(prompt=8, new=4)
    kinds: dict[str, float] = {"attention": 0.0, "mlp": 0.0, kind: 20.0}
    saved = {(n, each): {"none": ms} for n in range(2) for each, ms in kinds.items()}
    budget = Budget(floors=Floors(0.5), at=at)
    plan = planner(budget, made_table(saved, at=at)).plan().plan
    assert {deletion.kind for deletion in plan.deletions} == {kind}
    assert plan.predicted["speedup"] == pytest.approx(100 / (100 - 20 * len(plan.deletions)))
    assert plan.budget["at"] == str(at)


def test_the_gentlest_sublayer_is_tried_where_all_that_saves_more_costs_too_much(
    planner: Any,
) -> None:
    counted = planner(Budget(floors=Floors(0.5)))
    gentle, _ = counted.search.gentlest(counted._used_up)
    (name,) = gentle.choices
    at = RequestShape(prompt=8, new=4)
    names = [*counted.sizes.sublayers]
    saved = {each: {"none": 0.01 if each == name else 20.0} for each in names}
    found = planner(Budget(floors=Floors(0.5), at=at), made_table(saved, at=at))
    first, second, *_ = found._candidates()[0]
    assert [*first.candidate.choices] == [name]
    assert name not in second.candidate.choices
    # Where what saves most also costs least, nothing is put before it.
    table = made_table({each: {"none": 10.0} for each in names}, at=at)
    even = planner(Budget(floors=Floors(0.5), at=at), table)._candidates()[0]
    assert [len(each.candidate.choices) for each in even] == [*range(1, len(even) + 1)]


class Broken:
    """A stopwatch whose graph can't be run."""

    def costs(self, *_: Any) -> Any:
        raise CostError("It has no such input.", code="no-input")


def test_parameters_are_counted_where_no_request_can_be_timed(planner: Any) -> None:
    at = RequestShape(prompt=8, new=4)
    plan = planner(Budget(floors=Floors(0.5), at=at), stopwatch=Broken()).plan().plan
    assert plan.deletions == planner(Budget(floors=Floors(0.5))).plan().plan.deletions
    assert "speedup" not in plan.predicted
    with raises(CostError, "no-input"):
        planner(Budget(target_speedup=1.1, at=at), stopwatch=Broken()).plan()


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
    assert runs.first.time_s == 24.0
    late = TrialRuns(
        loaded, HealOptions(kind="distill", time_s=60.0), Floors(0.5), tmp_path, spent_s=500.0
    )
    assert late.first.time_s == 24.0, "the same for a call that goes on"
    unlimited = TrialRuns(loaded, HealOptions(kind="distill"), Floors(0.5), tmp_path)
    assert unlimited.first.time_s == 0.4 * USUAL_TIME_S
    assert TrialRuns(loaded, HealOptions(kind="fold"), Floors(0.5), tmp_path).first.time_s is None


@pytest.mark.parametrize(
    ("time_s", "spent_s", "tried"),
    [(3600.0, 0.0, 2), (0.001, 0.0, 1), (3600.0, 3599.0, 2)],  # half is left for healing
)
def test_no_cut_is_begun_that_can_not_be_finished_in_time(
    loaded: Any, texts: list[str], tmp_path: Path, time_s: float, spent_s: float, tried: int
) -> None:
    options = HealOptions(
        **FOLD | DISTILL | {"kind": "auto", "check_text": texts[1], "time_s": time_s},
        calibration=(texts[0],),
    )
    never = Floors(1e-9)
    runs = TrialRuns(loaded, options, never, tmp_path / FOLDER, (), spent_s)
    cuts = [cut_of(layer, 1e-10 * (1 + layer)) for layer in range(2)]
    ladder = largest_within(cuts, never, runs, plan_of)
    assert [rung.number for rung in ladder.tried] == [1, 0][:tried]
    assert not any(rung.holds for rung in ladder.tried)


def cut_of(layer: int, rise: float) -> Candidate:
    """The MLPs up to a layer, with what they are said to cost."""
    options = (Option((SublayerRef(each, "mlp"),)) for each in range(layer + 1))
    ones = np.ones(2)
    damage = Damage(ones, rise * ones, ones, rise * ones, 0 * ones)
    return Candidate(PlanCandidate(tuple(options)), damage)


def plan_of(candidate: PlanCandidate) -> PruningPlan:
    return PruningPlan(deletions=candidate.deletions)


def measured(rise: float, error: float | None, samples: int) -> HealedText:
    damage = AnswerDamage(
        perplexity=1.0, log_perplexity_increase=rise, log_perplexity_increase_std_error=error,
        kl=rise, kl_std_error=None, top1_agreement=0.5,
    )  # fmt: skip
    ref = CalibrationRef(
        source="t", samples=samples, sequence_length=8, tokens=8 * samples, sha256="0" * 64
    )
    return HealedText(
        role="calibration", text=ref, baseline_perplexity=1.0, dropped=damage, healed=damage,
        gain=0.0, gain_std_error=None,
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
    assert not is_lost(measured(rise, error, samples), Floors(None, 0.99))


@pytest.mark.parametrize(("texts", "holds"), [(12, False), (182, False), (183, True)])
def test_texts_that_all_keep_their_class_show_as_much_as_they_are_many(
    texts: int, holds: bool
) -> None:
    ones, ids = np.ones(texts), np.ones((texts, 8), np.int64)
    damage = ClassDamage(ones, 0 * ones, ones)
    text = CalibrationText.unpadded(ids, "t", "0" * 64)
    floors = Floors(top1_agreement=0.98)
    _, healed = figures_of(
        SimpleNamespace(measured=[_told("calibration", text, [damage], [damage])])  # type: ignore[arg-type]
    )
    assert healed["top1_agreement"] == 1
    assert rung_of(0, healed, floors).holds is holds
    meter: Any = SimpleNamespace(measure_many=lambda *_: [damage])
    assert QualityCheck(meter, floors).holds(PlanCandidate()) is holds


@pytest.mark.parametrize(("labels", "texts"), [(3, 2 * 29), (1, 4 * 29)])
def test_as_many_paragraphs_judge_classes_as_show_the_limit(
    labels: int, texts: int, tmp_path: Path
) -> None:
    words = [f"w{n}" for n in np.random.default_rng(0).integers(0, 60, 8000)]
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(words[n : n + 20]) for n in range(0, 8000, 20)))
    model = tiny_loaded(
        "bert", tiny_tokenizer(special_ends=True), head="SequenceClassification", num_labels=labels
    )
    options = HealOptions(**{**FOLD, "sequence_length": 24}, calibration=(str(text),))
    runs = TrialRuns(model, options, Floors(top1_agreement=0.88), tmp_path / FOLDER)
    choosing, judging = runs.texts.halves
    assert len(judging.input_ids) == texts
    assert len(choosing.input_ids) == 32
    assert len(runs.texts.fitting.input_ids) > 24


def test_cuts_that_others_of_the_held_out_texts_judged_are_not_found_again(tmp_path: Path) -> None:
    words = [f"w{n}" for n in np.random.default_rng(0).integers(0, 60, 1200)]
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(words[n : n + 20]) for n in range(0, 1200, 20)))
    model = tiny_loaded(
        "bert", tiny_tokenizer(special_ends=True), head="SequenceClassification", num_labels=3
    )
    options = HealOptions(**{**FOLD, "sequence_length": 24}, calibration=(str(text),))

    def runs(limit: float) -> TrialRuns:
        return TrialRuns(model, options, Floors(top1_agreement=limit), tmp_path / FOLDER)

    first, other = runs(0.88), runs(0.87)
    assert first.texts.held_out.ids_sha256 == other.texts.held_out.ids_sha256
    first._store.keep("cut", "trial-0")
    assert runs(0.88)._store.find("cut") == "trial-0"
    assert other._store.find("cut") is None


def classifier(labels: int, **changes: Any) -> Any:
    head = {"head": "SequenceClassification", "num_labels": labels, **changes}
    return tiny_loaded("bert", tiny_tokenizer(special_ends=True), **head).model


@pytest.mark.parametrize(
    ("labels", "highest"), [(3, 0.996), (1, 0.992)], ids=["classes", "pairs of texts"]
)
def test_a_limit_that_no_number_of_texts_shows_is_refused(labels: int, highest: float) -> None:
    held = Floors(top1_agreement=highest)
    assert Judges.of(held, classifier(labels)).usual == 1024
    with raises(PlanError, "too-near-to-1", f"--min-top1-agreement {highest}"):
        Judges.of(Floors(top1_agreement=highest + 0.001), classifier(labels))


def test_a_limit_that_labels_of_their_own_show_is_not_refused() -> None:
    separate = {"problem_type": "multi_label_classification"}
    near = Floors(top1_agreement=0.999)
    assert Judges.of(near, classifier(5, **separate)).usual == 1024
    with raises(PlanError, "too-near-to-1"):
        Judges.of(near, classifier(5))
    told = "1,476", "--min-top1-agreement 0.999 "  # texts of five answers each
    with raises(PlanError, "too-near-to-1", *told):
        Judges.of(Floors(top1_agreement=0.9995), classifier(5, **separate))


def test_a_cut_that_is_given_up_is_measured_on_what_was_seen(
    loaded: Any, texts: list[str], tmp_path: Path
) -> None:
    options = HealOptions(**FOLD | {"check_text": texts[1]}, calibration=(texts[0],))
    plan = PruningPlan(deletions=[PlannedDeletion(layer=1, kind="mlp")])

    rungs = []

    def healing(floors: Floors, work: Path) -> Any:
        runs = TrialRuns(loaded, options, floors, work)
        rungs.append(runs.run(0, plan))
        return runs.cuts[0].report.healing

    whole = healing(Floors(1e6), tmp_path / FOLDER / "whole")
    assert [text.role for text in whole.texts] == ["calibration", "other"]
    assert whole.texts[0].text.samples == 3 + JUDGED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporter.choose.budgets.trial_runs.is_lost", lambda *_, **__: True)
        short = healing(Floors(1e6), tmp_path / FOLDER / "short")
    assert [text.text.samples for text in short.texts] == [4]
    figures = short.texts[0].healed
    error = figures.log_perplexity_increase_std_error / Floors(1e6).log_perplexity_increase
    assert rungs[1].high - rungs[1].cost < 2 * error, "as wide as on all samples, not on four"
    again = healing(Floors(1e6), tmp_path / FOLDER / "short")
    assert again.texts == whole.texts, "limits that it may keep after all"


@pytest.mark.parametrize(
    ("healed", "floors", "told", "untold"),
    [
        ({"top1_agreement": 0.9, SAME: 0.8316}, Floors(top1_agreement=0.9),
         "--min-top1-agreement 0.831", "--at-most"),
        ({"cosine": 0.99, LOW: 0.9899, SIMILARITY: 0.95, ENDS[SIMILARITY]: 0.9399},
         Floors(embedding_cosine=0.3, similarity=0.999), "--min-similarity 0.939",
         "--min-embedding-cosine"),
        ({"log_perplexity_increase": 0.01, HIGH: math.log1p(0.02041), "top1_agreement": 0.9},
         Floors(0.02, 0.8), "--at-most 2.1%", "--min-top1-agreement"),
        ({"log_perplexity_increase": 0.01, HIGH: math.log1p(0.01), "top1_agreement": 0.7},
         Floors(0.02, 0.8), "--min-top1-agreement 0.7", "--at-most"),
        ({"cosine": -0.5, LOW: -0.6}, Floors(embedding_cosine=0.3), "", "--min-embedding-cosine"),
    ],
)  # fmt: skip
def test_the_limits_that_would_allow_a_cut_are_named_and_would(
    healed: dict[str, float], floors: Floors, told: str, untold: str
) -> None:
    cut = TriedCut(
        deletions=[PlannedDeletion(layer=0, kind="mlp")], healed_by="fold", training_seconds=0.0,
        bare=healed, healed=healed, holds=False,
    )  # fmt: skip
    with pytest.raises(UnmetGoalError) as refused:
        refuse_all([cut], floors)
    hint = refused.value.hint
    assert told in hint
    assert untold not in hint


def test_what_is_not_shown_is_no_answer() -> None:
    def tried(rise: float, high: float, number: int = 1) -> TriedCut:
        healed = {"log_perplexity_increase": rise, HIGH: high, "top1_agreement": 0.9}
        deletions = [PlannedDeletion(layer=layer, kind="mlp") for layer in range(number)]
        return TriedCut(
            deletions=deletions, healed_by="fold", training_seconds=0.0, bare=healed,
            healed=healed, holds=False,
        )  # fmt: skip

    limit = Floors(0.02)
    with raises(UnmetGoalError, "nothing-within-limits", "mlp 0"):
        refuse_all([tried(0.05, 0.06), tried(0.1, 0.2, 2)], limit)
    with raises(UnmetGoalError, "nothing-within-limits", "mlp 0", "1.020"):
        cuts = [tried(0.1, 0.2, 2), tried(0.05, 0.06)]
        refuse_all(cuts, limit, gained=["a speedup of 1.050", "a speedup of 1.020"])
    for cuts, smaller in (([tried(0.015, 0.03)], False), ([tried(0.05, 0.06)], True)):
        with raises(UndecidedGoalError, "undecided-nothing-within-limits"):
            refuse_all(cuts, limit, smaller=smaller)
