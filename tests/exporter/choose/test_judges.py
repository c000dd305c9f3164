"""As many texts, pairs or images judge a classifier's cut as it takes to show a limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporter.artifacts.store import FOLDER
from exporter.choose.budgets.budget import Budget, Floors, SearchOptions
from exporter.choose.budgets.limits import QualityCheck, damage_figures, rung_of
from exporter.compare.intervals import mean_interval, share_interval
from exporter.errors import PlanError
from exporter.heal.options import HealOptions
from exporter.models.ablation.damage import SIMILARITY, ClassDamage, Damage, EmbeddingDamage
from exporter.models.texts.calibration import CalibrationText, calibration_text, mixed_text
from exporter.score.options import ScoreOptions
from exporter.score.scoring import score
from tests.exporter.made_plans import made_planner
from tests.raising import raises
from tests.tiny_models import (
    tiny_loaded,
    tiny_tokenizer,
    write_images,
    write_processor,
    write_words,
)

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.choose.budgets.inputs import Judges, parted  # noqa: E402
from exporter.choose.budgets.trial_runs import TrialRuns, figures_of  # noqa: E402
from exporter.heal.healed import _told  # noqa: E402
from exporter.heal.texts import healing_texts, text_behind, text_beyond  # noqa: E402
from exporter.models.tasks import EmbeddingReference  # noqa: E402

LIMIT, FEWEST = 0.9, 36
FLOORS = Floors(top1_agreement=LIMIT)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A classifier of images whose second MLP adds nothing."""
    head = {"head": "ImageClassification", "architectures": ["ViTForImageClassification"]}
    loaded = tiny_loaded("vit", num_labels=6, **head)
    loaded.model.classifier.weight.mul_(4)
    for name, weight in loaded.model.named_parameters():
        if ".1.mlp.fc2" in name:
            weight.mul_(0)
    folder = tmp_path_factory.mktemp("model")
    write_processor(folder)
    return replace(loaded, path=folder)


def classifier(labels: int, **changes: Any) -> Any:
    head = {"head": "SequenceClassification", "num_labels": labels, **changes}
    return tiny_loaded("bert", tiny_tokenizer(special_ends=True), **head)


def paragraphs_of(folder: Path, number: int) -> str:
    return write_words(folder / f"{number}.txt", 20 * number, seed=0, each=(20, 21))


def folding(*specs: str, samples: int = 40, **more: Any) -> HealOptions:
    return HealOptions(kind="fold", samples=samples, calibration=specs, **more)


def planner(
    loaded: Any, work: Path, heal: Any = None, limit: float = LIMIT, spec: str = "random",
    samples: int = 8,
) -> Any:  # fmt: skip
    report = score(loaded, ScoreOptions(calibration=(spec,), samples=samples))
    budget = Budget(floors=Floors(top1_agreement=limit))
    search = SearchOptions(search="greedy", tokens=40)
    return made_planner(loaded, report, work / FOLDER / "work", budget, search, heal=heal)


@pytest.mark.parametrize(
    "heal", [None, folding("random", samples=8, sequence_length=5)], ids=["bare", "fold"]
)
def test_a_harmless_cut_is_found_by_more_images_than_are_scored_on(
    images: Any, heal: HealOptions | None, tmp_path: Path
) -> None:
    plan = planner(images, tmp_path, heal).plan().plan
    assert (1, "mlp") in {ref for deletion in plan.deletions for ref in deletion.sublayers}
    judged = plan.roles["stopped"][-1]
    assert judged.samples >= FEWEST
    parts = {ref.ids_sha256 for name in ("chosen", "fitted") for ref in plan.roles.get(name, [])}
    assert judged.ids_sha256 not in parts


@pytest.mark.parametrize(
    ("there", "holds", "is_apart"),
    [(99, False, False), (100, True, False), (127, True, False), (128, True, False),
     (163, True, False), (164, True, True)],
)  # fmt: skip
def test_more_images_never_refuse_what_fewer_hold(
    images: Any, there: int, holds: bool, is_apart: bool, tmp_path: Path
) -> None:
    """As many again are fitted on only if enough are left to judge behind them."""
    spec = str(write_images(tmp_path / "images", there))
    result = planner(images, tmp_path, HealOptions(kind="linear"), spec=spec, samples=64)
    if not holds:
        named = "--calibration", "--min-top1-agreement"
        with raises(PlanError, "too-few-to-show", *named) as caught:
            _ = result.texts
        assert "--heal-calibration" not in str(caught.value)
        return
    judging = there - (128 if is_apart else 64)
    parts = {result.texts.checked.ids_sha256, result.texts.reported.ids_sha256}
    numbers = [len(item.input_ids) for item in (result.texts.checked, result.texts.reported)]
    assert sum(numbers) // (3 - len(parts)) == judging
    assert (result.fitted_text is not result.texts.searched) is is_apart


@pytest.mark.parametrize(
    ("judges", "samples", "sizes"),
    [
        (Judges(fewest=5, usual=10), 13, [7, 6]),
        (Judges(fewest=5, usual=10), 9, None),
        (Judges(fewest=6, usual=12, together=2), 14, [8, 6]),  # whole pairs
    ],
)
def test_both_parts_show_the_limit_or_are_the_same(
    images: Any, judges: Judges, samples: int, sizes: list[int] | None
) -> None:
    text = calibration_text(images, "random", samples=samples)
    parts = judges.parted(text)
    assert (parts == (text, text)) is (sizes is None)
    assert sizes is None or [len(part.input_ids) for part in parts] == sizes


def test_what_judges_is_none_of_what_was_used(images: Any, tmp_path: Path) -> None:
    whole = calibration_text(images, "random", samples=20)
    result = text_beyond(images, [whole.rows(slice(0, 4)), whole.rows(slice(4, 9))], 6)
    assert result.ids_sha256 == whole.rows(slice(9, 15)).ids_sha256
    odd = np.arange(20) % 2 == 1
    assert text_beyond(images, [whole.rows(odd)], 10).ids_sha256 == whole.rows(~odd).ids_sha256
    # Of a mixture the longer texts judge where another is short.
    numbers = {"longer": 43, "shorter": 16}
    specs = [str(write_images(tmp_path / name, n, seed=n)) for name, n in numbers.items()]
    used = mixed_text(images, specs, samples=8)
    parts = [used, text_behind(images, used)]
    sizes = [len(text_beyond(images, parts[:n], 99).input_ids) for n in (2, 1)]
    assert sizes == [43 - 16, 43 - 8 + 16 - 8]


@pytest.mark.parametrize(("samples", "texts"), [(40, 1), (41, 1), (7, 1), (16, 2)])
def test_a_reranker_s_parts_have_both_texts_of_each_answer(
    samples: int, texts: int, tmp_path: Path
) -> None:
    specs = []
    for number in range(texts):
        drawn = np.random.default_rng(number).integers(0, 60, (60, 30))
        rows = [[f"w{n}" for n in row] for row in drawn]
        path = tmp_path / f"text{number}.txt"
        path.write_text("\n\n".join(f"{' '.join(p[:8])}. {' '.join(p[8:])}" for p in rows))
        specs.append(str(path))
    loaded, size = classifier(1), {"samples": samples, "sequence_length": 35}
    text = mixed_text(loaded, specs, passages=True, **size)
    text = replace(text, documents=np.zeros_like(text.documents))
    healing = healing_texts(loaded, folding(*specs, **size))
    searched = vars(parted(text, 0.4, together=2)).values()
    fitting = [healing.fitting] * (texts == 1)  # a mixture's texts come in turn
    for part in (*healing.halves, *fitting, *searched):
        ids, whole = part.input_ids, len(part.input_ids) // 2 * 2
        assert whole
        assert whole == len(ids) or part in searched
        assert (ids[:whole:2, 1:7] == ids[1:whole:2, 1:7]).all()


@pytest.mark.parametrize(("labels", "texts"), [(3, 2 * 29), (1, 4 * 29)])
def test_as_many_paragraphs_judge_classes_as_show_the_limit(
    labels: int, texts: int, tmp_path: Path
) -> None:
    heal = folding(paragraphs_of(tmp_path, 400), samples=24, sequence_length=24)

    def runs(limit: float) -> TrialRuns:
        floors = Floors(top1_agreement=limit)
        return TrialRuns(classifier(labels), heal, floors, tmp_path / FOLDER)

    first, other = runs(0.88), runs(0.87)
    choosing, judging = first.texts.halves
    assert texts <= len(judging.input_ids) <= texts + 4  # documents stay whole
    assert 28 <= len(choosing.input_ids) <= 32
    assert len(first.texts.fitting.input_ids) > 24
    # Cuts that others of the held-out texts judged are not found again.
    first._store.keep("cut", "trial-0")
    assert runs(0.88)._store.find("cut") == "trial-0"
    assert other._store.find("cut") is None


def measuring(damage: Any, heard: list[int] | None = None) -> Any:
    """A meter that measures so many texts, and says so."""

    def measure(*_: Any) -> list[Any]:
        if heard is not None:
            heard.append(len(damage.kl_sums))
        return [damage]

    return SimpleNamespace(measure_many=measure, num_layers=2)


def kept_of(same: Any) -> ClassDamage:
    """Of texts that keep their class, or don't."""
    return ClassDamage(np.ones(len(same)), np.zeros(len(same)), np.array(same, float))


def healed_figures(damage: Any, text: CalibrationText) -> dict[str, float]:
    measured = _told("calibration", text, [damage], [damage])
    made: Any = SimpleNamespace(of_role={"calibration": measured}.get)
    return figures_of(made)[1]


@pytest.mark.parametrize(("kept", "asked"), [(0, 1), (8, 2)])
def test_a_cut_that_is_clearly_lost_is_not_measured_on_all(kept: int, asked: int) -> None:
    runs: list[int] = []
    first, whole = (measuring(kept_of([1] * n + [0] * (s - n)), runs)
                    for n, s in ((kept, 8), (100, 100)))  # fmt: skip
    check = QualityCheck(whole, FLOORS, (first, None))
    assert check.holds({}) is (kept == 8)
    assert len(runs) == asked
    assert check.rung({}).is_beyond is (kept == 0)


_SAME = np.array([0] * 10 + [1] * 30, float)


@pytest.mark.parametrize(
    ("name", "damage", "floors"),
    [
        ("top1_agreement", kept_of(_SAME), Floors(top1_agreement=0.55)),
        (
            "cosine",
            EmbeddingDamage(0.9 + 0.1 * _SAME, np.ones((40, 6)), np.ones(40)),
            Floors(embedding_cosine=0.95),
        ),
    ],
)
def test_texts_of_one_document_count_as_one(name: str, damage: Any, floors: Floors) -> None:
    """Forty alike texts of four documents aren't forty: an interval over texts is too narrow."""
    documents = np.repeat(np.arange(4), 10)
    # The last has two texts an answer.
    clusters = (None, documents, np.repeat(documents, 2))
    checks = [QualityCheck(measuring(damage), floors, clusters=item) for item in clusters]
    assert [check.holds({}) for check in checks] == [True, False, False]
    alone, grouped = (damage_figures(damage, item) for item in clusters[:2])
    assert alone[name] == pytest.approx(grouped[name])
    error = f"{name}_std_error"
    assert error not in alone or alone[error] < grouped[error]


def test_the_first_texts_are_of_their_own_documents() -> None:
    """Texts of two documents show nothing for certain."""
    first, whole = (measuring(kept_of(same)) for same in ([0] * 20 + [1] * 4, [1] * 100))
    documents = np.repeat(np.arange(10), 12)[:100]
    check = QualityCheck(whole, FLOORS, (first, documents[:24]), documents)
    assert check.holds({})


@pytest.mark.parametrize(("texts", "holds"), [(12, False), (182, False), (183, True)])
def test_texts_that_all_keep_their_class_show_as_much_as_they_are_many(
    texts: int, holds: bool
) -> None:
    damage, floors = kept_of([1] * texts), Floors(top1_agreement=0.98)
    text = CalibrationText.unpadded(np.ones((texts, 8), np.int64), "t", "0" * 64)
    healed = healed_figures(damage, text)
    assert healed["top1_agreement"] == 1
    assert rung_of(0, healed, floors).holds is holds
    assert QualityCheck(measuring(damage), floors).holds({}) is holds


def test_a_healed_cut_is_judged_by_the_intervals_of_comparisons() -> None:
    rng, documents = np.random.default_rng(0), np.repeat(np.arange(4), (36, 2, 1, 1))
    kept, rises = rng.integers(2, 9, 40) * 1.0, rng.exponential(size=40)
    ones, tokens = np.ones(40), np.full(40, 8.0)
    whole, other = (torch.from_numpy(rng.normal(size=(40, 8))) for _ in range(2))
    of_texts = EmbeddingReference(whole).damage(whole + other)
    text = CalibrationText.unpadded(np.ones((40, 8), np.int64), "t", "0" * 64)
    text = replace(text, documents=documents)
    healed = healed_figures(Damage(tokens, 0 * ones, kept, rises, 0 * ones), text)
    healed |= healed_figures(of_texts, text)
    result = {
        "log_perplexity_increase": mean_interval(rises, tokens, documents),
        "top1_agreement": share_interval(kept, tokens, documents),
        "cosine": mean_interval(of_texts.cosines, ones, documents),
        SIMILARITY: mean_interval(of_texts.correlations, ones, documents),
    }
    for name, interval in result.items():
        ends = sorted(healed[f"{name}_{end}"] for end in ("low", "high"))
        assert ends == pytest.approx(interval.ci95), name


@pytest.mark.parametrize(
    ("labels", "changes", "holds", "breaks", "named"),
    [
        (3, {}, 0.996, 0.997, ["--min-top1-agreement 0.996"]),
        (1, {}, 0.992, 0.993, ["--min-top1-agreement 0.992"]),  # pairs of texts
        # Texts of five answers each.
        (5, {"problem_type": "multi_label_classification"}, 0.999, 0.9995,
         ["1,476", "--min-top1-agreement 0.999 "]),
        (5, {}, 0.99, 0.999, []),
    ],
)  # fmt: skip
def test_a_limit_that_no_number_of_texts_shows_is_refused(
    labels: int, changes: Any, holds: float, breaks: float, named: list[str]
) -> None:
    model = classifier(labels, **changes).model
    assert holds == 0.99 or Judges.of(Floors(top1_agreement=holds), model).usual == 1024
    with raises(PlanError, "too-few-to-show", *named):
        Judges.of(Floors(top1_agreement=breaks), model)
