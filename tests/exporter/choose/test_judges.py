"""As many texts, pairs or images judge a classifier's cut as it takes to show a limit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporter.artifacts.store import FOLDER
from exporter.choose.budgets.budget import Budget, Floors
from exporter.choose.budgets.candidates import PlanCandidate, QualityCheck
from exporter.choose.budgets.limits import damage_figures
from exporter.choose.budgets.settings import PlanSettings
from exporter.choose.selection.search_options import SearchOptions
from exporter.errors import PlanError
from exporter.heal.options import HealOptions
from exporter.models.ablation.damage import ClassDamage, EmbeddingDamage
from tests.raising import raises
from tests.tiny_models import tiny_loaded, tiny_tokenizer, write_images, write_processor

pytestmark = pytest.mark.torch
pytest.importorskip("torch")

from exporter.choose.budgets.judges import Judges, checked_of, parted  # noqa: E402  # noqa: E402
from exporter.choose.budgets.planner import Planner  # noqa: E402
from exporter.choose.budgets.trial_runs import TrialRuns  # noqa: E402
from exporter.heal.texts import (  # noqa: E402
    healing_texts,
    text_behind,
    text_beyond,
)
from exporter.models.texts.calibration import CalibrationText, calibration_text  # noqa: E402
from exporter.models.texts.mixtures import mixed_text  # noqa: E402
from exporter.score import ScoreOptions, score  # noqa: E402

LIMIT, FEWEST = 0.9, 36
FOLD = HealOptions(kind="fold", samples=8, sequence_length=5, calibration=("random",))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A classifier of images whose second MLP adds nothing."""
    loaded = tiny_loaded(
        "vit",
        head="ImageClassification",
        num_labels=6,
        architectures=["ViTForImageClassification"],
    )
    loaded.model.classifier.weight.mul_(4)
    for name, weight in loaded.model.named_parameters():
        if ".1.mlp.fc2" in name:
            weight.mul_(0)
    folder = tmp_path_factory.mktemp("model")
    write_processor(folder)
    return replace(loaded, path=folder)


def planner(
    loaded: Any,
    work: Path,
    heal: HealOptions | None,
    limit: float = LIMIT,
    spec: str = "random",
    samples: int = 8,
) -> Planner:
    options = ScoreOptions(calibration=(spec,), samples=samples)
    return Planner(
        score(loaded, options),
        lambda: loaded,
        Budget(floors=Floors(top1_agreement=limit)),
        PlanSettings(search=SearchOptions(search="greedy", tokens=40), heal=heal),
        work=work / FOLDER / "work",
    )


@pytest.mark.parametrize("heal", [None, FOLD], ids=["bare", "fold"])
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
    heal = HealOptions(kind="linear")
    result = planner(images, tmp_path, heal, spec=spec, samples=64)
    if not holds:
        with raises(
            PlanError, "too-few-to-show", "--calibration", "--min-top1-agreement"
        ) as caught:
            _ = result.texts
        assert "--heal-calibration" not in str(caught.value)
        return
    judging = there - (128 if is_apart else 64)
    parts = {result.texts.checked.ids_sha256, result.texts.reported.ids_sha256}
    numbers = [len(item.input_ids) for item in (result.texts.checked, result.texts.reported)]
    assert sum(numbers) // (3 - len(parts)) == judging
    assert (result.fitted_text is not result.texts.searched) is is_apart


def test_of_a_mixture_the_longer_texts_judge_where_another_is_short(
    images: Any, tmp_path: Path
) -> None:
    numbers = {"longer": 43, "shorter": 16}
    specs = [str(write_images(tmp_path / name, n, seed=n)) for name, n in numbers.items()]
    used = mixed_text(images, specs, samples=8)
    again = text_behind(images, used)
    assert again is not None
    assert len(text_beyond(images, [used, again], 99).input_ids) == 43 - 16
    assert len(text_beyond(images, [used], 99).input_ids) == 43 - 8 + 16 - 8


@pytest.mark.parametrize(
    ("there", "holds", "again"),
    [(43, False, True), (44, True, True), (79, True, True), (80, True, True), (83, True, True),
     (84, True, False)],
)  # fmt: skip
def test_more_images_never_refuse_what_fewer_heal(
    images: Any, there: int, holds: bool, again: bool, tmp_path: Path
) -> None:
    spec = str(write_images(tmp_path / "images", there))
    heal = HealOptions(kind="fold", samples=40, calibration=(spec,))
    chosen = calibration_text(images, spec, samples=40).ref
    options = {"judging": 2 * FEWEST, "fewest": FEWEST}
    texts = healing_texts(images, heal, chosen_on=[chosen], **options)
    assert (len(texts.halves[1].input_ids) >= FEWEST) is holds
    assert bool(texts.again) is again


@pytest.mark.parametrize(("each", "holds"), [(25, False), (26, True)])
def test_of_each_text_that_heals_some_are_fitted_on_and_choose(
    images: Any, each: int, holds: bool, tmp_path: Path
) -> None:
    specs = [str(write_images(tmp_path / str(n), each, seed=100 * n)) for n in range(2)]
    heal = HealOptions(kind="fold", samples=40, calibration=tuple(specs))
    texts = healing_texts(images, heal, judging=2 * FEWEST, fewest=FEWEST)
    assert (len(texts.halves[1].input_ids) >= FEWEST) is holds
    runs = TrialRuns(images, heal, Floors(top1_agreement=LIMIT), tmp_path / FOLDER)
    if holds:
        assert len(runs.judging.input_ids) >= FEWEST
        return
    with raises(PlanError, "too-few-to-show", "--heal-calibration"):
        _ = runs.texts


def test_no_more_images_are_asked_for_than_are_ever_read(
    images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("models.texts.images", "choose.budgets.judges", "heal.texts"):
        monkeypatch.setattr(f"exporter.{module}.MOST_IMAGES", 60)
    for spec in (str(write_images(tmp_path / "images", 61)), "random"):
        named = 60, "--samples", "--min-top1-agreement 0.831"
        with raises(PlanError, "too-few-to-show", *named) as caught:
            _ = planner(images, tmp_path, None, spec=spec, samples=40).texts
        assert "--calibration" not in str(caught.value)
        assert planner(images, tmp_path, None, spec=spec, samples=24).texts


def words(folder: Path, paragraphs: int) -> str:
    texts = [f"w{n}" for n in np.random.default_rng(0).integers(0, 60, 20 * paragraphs)]
    parts = (" ".join(texts[at : at + 20]) for at in range(0, len(texts), 20))
    path = folder / f"{paragraphs}.txt"
    path.write_text("\n\n".join(parts))
    return str(path)


@pytest.mark.parametrize(("paragraphs", "said"), [(150, "stretches"), (3, "one document"), (0, "")])
def test_texts_that_have_too_few_documents_are_told_of(
    paragraphs: int, said: str, tmp_path: Path
) -> None:
    lines: list[str] = []
    spec = words(tmp_path, paragraphs or 150)
    if not paragraphs:
        parts = Path(spec).read_text().split("\n\n")
        spec = str(tmp_path / "lines.jsonl")
        Path(spec).write_text("\n".join(json.dumps({"text": part}) for part in parts))
    listener: Any = SimpleNamespace(say=lines.append, detail=lines.append)
    text = calibration_text(
        classifier(3), spec, samples=4, sequence_length=16, passages=True, progress=listener
    )
    assert [said in line for line in lines if "document" in line] == [True] * bool(said)
    assert len(set(text.documents)) > 1 or paragraphs == 3


def classifier(labels: int) -> Any:
    head = {"head": "SequenceClassification", "num_labels": labels}
    return tiny_loaded("bert", tiny_tokenizer(special_ends=True), **head)


def test_what_judges_is_none_of_what_was_used(images: Any) -> None:
    whole = calibration_text(images, "random", samples=20)
    used = [whole.rows(slice(0, 4)), whole.rows(slice(4, 9))]
    result = text_beyond(images, used, 6)
    assert result.ids_sha256 == whole.rows(slice(9, 15)).ids_sha256
    other = [whole.rows(np.arange(20) % 2 == 1)]
    between = whole.rows(np.arange(20) % 2 == 0)
    assert text_beyond(images, other, 10).ids_sha256 == between.ids_sha256


@pytest.mark.parametrize(("other", "shares"), [(12, None), (140, [30, 30])])
def test_longer_texts_judge_in_place_of_shorter_ones(
    other: int, shares: list[int] | None, tmp_path: Path
) -> None:
    loaded, specs = classifier(3), [words(tmp_path, 150), words(tmp_path, other)]
    options: dict[str, Any] = {"samples": 8, "sequence_length": 16, "passages": True}
    used = mixed_text(loaded, specs, **options)
    result = text_beyond(loaded, [used], 60)
    assert len(result.input_ids) == 60
    counts = [len(item.input_ids) for item in result.apart]
    assert counts == shares or (shares is None and counts[0] > 30 > counts[1])
    assert len(text_beyond(loaded, [used], 9999).input_ids) < 9999


@pytest.mark.parametrize("samples", range(1, 40))
def test_as_many_are_counted_as_the_search_holds_out(samples: int) -> None:
    text = CalibrationText.unpadded(np.arange(samples)[:, None], "t", "0" * 64)
    for held_out in (0.1, 0.25, 0.5):
        assert checked_of(samples, held_out) == len(parted(text, held_out).checked.input_ids)


@pytest.mark.parametrize("samples", [40, 41, 7])
def test_a_reranker_s_parts_have_both_texts_of_each_answer(samples: int, tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).integers(0, 60, (60, 30))
    parts = [[f"w{n}" for n in row] for row in drawn]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"{' '.join(p[:8])}. {' '.join(p[8:])}" for p in parts))
    options = HealOptions(
        kind="fold", samples=samples, sequence_length=35, calibration=(str(path),)
    )
    texts = healing_texts(classifier(1), options)
    for part in (*texts.halves, texts.fitting):
        ids = part.input_ids
        assert len(ids) % 2 == 0
        assert (ids[::2, 1:7] == ids[1::2, 1:7]).all()


@pytest.mark.parametrize("texts", [1, 2])
def test_a_reranker_s_search_and_mixtures_have_both_texts_of_each_answer(
    texts: int, tmp_path: Path
) -> None:
    specs = []
    for number in range(texts):
        drawn = np.random.default_rng(number).integers(0, 60, (60, 30))
        result = [[f"w{n}" for n in row] for row in drawn]
        specs.append(tmp_path / f"text{number}.txt")
        lines = (f"{' '.join(p[:8])}. {' '.join(p[8:])}" for p in result)
        specs[-1].write_text("\n\n".join(lines))
    options: dict[str, Any] = {"samples": 16, "sequence_length": 35, "passages": True}
    text = mixed_text(classifier(1), [str(spec) for spec in specs], **options)
    text = replace(text, documents=np.zeros_like(text.documents))
    for part in vars(parted(text, 0.4, together=2)).values():
        ids = part.input_ids
        whole = len(ids) // 2 * 2
        assert whole
        assert (ids[:whole:2, 1:7] == ids[1:whole:2, 1:7]).all()


@pytest.mark.parametrize(("paragraphs", "judging"), [(75, FEWEST), (24, None)])
def test_a_short_text_judges_before_it_fits(
    paragraphs: int, judging: int | None, tmp_path: Path
) -> None:
    options = HealOptions(
        kind="fold", samples=40, sequence_length=24, calibration=(words(tmp_path, paragraphs),)
    )
    texts = healing_texts(classifier(3), options, judging=2 * FEWEST, fewest=FEWEST)
    _, judged = texts.halves
    assert len(texts.fitting.input_ids) >= 4
    assert (len(judged.input_ids) >= FEWEST) is (judging is not None)


@pytest.mark.parametrize(("kept", "asked"), [(0, 1), (8, 2)])
def test_a_cut_that_is_clearly_lost_is_not_measured_on_all(kept: int, asked: int) -> None:
    runs: list[int] = []

    def meter(number: int, same: int) -> Any:
        ones = np.ones(number)

        def measure(*_: Any) -> list[ClassDamage]:
            runs.append(number)
            return [ClassDamage(ones, 0 * ones, (np.arange(number) < same).astype(float))]

        return SimpleNamespace(measure_many=measure, num_layers=2)

    check = QualityCheck(meter(100, 100), Floors(top1_agreement=LIMIT), (meter(8, kept), None))
    assert check.holds(PlanCandidate()) is (kept == 8)
    assert len(runs) == asked
    assert check.rung(PlanCandidate()).is_beyond is (kept == 0)


_SAME = np.array([0] * 10 + [1] * 30, float)


@pytest.mark.parametrize(
    ("damage", "floors"),
    [
        (ClassDamage(np.ones(40), np.zeros(40), _SAME), Floors(top1_agreement=0.55)),
        (
            EmbeddingDamage(0.9 + 0.1 * _SAME, np.ones((40, 6)), np.ones(40)),
            Floors(embedding_cosine=0.95),
        ),
    ],
)
def test_texts_of_one_document_count_as_one(damage: Any, floors: Floors) -> None:
    """Forty alike texts of four documents aren't forty: an interval over texts is too narrow."""
    meter: Any = SimpleNamespace(measure_many=lambda *_: [damage], num_layers=2)
    alone = QualityCheck(meter, floors)
    assert alone.holds(PlanCandidate())
    documents = np.repeat(np.arange(4), 10)
    assert not QualityCheck(meter, floors, clusters=documents).holds(PlanCandidate())
    paired = QualityCheck(meter, floors, clusters=np.repeat(documents, 2))  # two texts an answer
    assert not paired.holds(PlanCandidate())
    name = "top1_agreement" if isinstance(damage, ClassDamage) else "cosine"
    figures = [damage_figures(damage, clusters) for clusters in (None, documents)]
    assert figures[0][name] == pytest.approx(figures[1][name])
    kept = f"{name}_std_error"
    assert kept not in figures[0] or figures[0][kept] < figures[1][kept]


def test_the_first_texts_are_of_their_own_documents() -> None:
    """Texts of two documents show nothing for certain."""

    def meter(same: list[float]) -> Any:
        ones, kept = np.ones(len(same)), np.array(same)
        damage = ClassDamage(ones, 0 * ones, kept)
        return SimpleNamespace(measure_many=lambda *_: [damage], num_layers=2)

    first, whole = meter([0.0] * 20 + [1.0] * 4), meter([1.0] * 100)
    documents = np.repeat(np.arange(10), 12)[:100]
    check = QualityCheck(whole, Floors(top1_agreement=0.9), (first, documents[:24]), documents)
    assert check.holds(PlanCandidate())


@pytest.mark.parametrize(("limit", "is_parted"), [(0.5, False), (LIMIT, True)])
def test_few_images_are_not_measured_twice(
    images: Any, limit: float, is_parted: bool, tmp_path: Path
) -> None:
    assert (planner(images, tmp_path, None, limit).checker._first is not None) is is_parted


def test_both_parts_show_the_limit_or_are_the_same(images: Any) -> None:
    judges = Judges(fewest=5, usual=10)
    whole = calibration_text(images, "random", samples=13)
    checked, reported = judges.parted(whole)
    assert [len(part.input_ids) for part in (checked, reported)] == [7, 6]
    short = whole.rows(slice(0, 9))
    assert judges.parted(short) == (short, short)


def test_both_parts_hold_whole_pairs(images: Any) -> None:
    judges = Judges(fewest=6, usual=12, together=2)
    checked, reported = judges.parted(calibration_text(images, "random", samples=14))
    assert [len(part.input_ids) for part in (checked, reported)] == [8, 6]
