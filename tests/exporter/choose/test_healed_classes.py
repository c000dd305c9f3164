"""How many texts of a classifier judge a healed cut, and what they can show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporter.artifacts.store import FOLDER
from exporter.errors import PlanError
from exporter.heal.options import HealOptions
from tests.raising import raises

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.choose.budgets.budget import Floors  # noqa: E402
from exporter.choose.budgets.candidates import PlanCandidate, QualityCheck  # noqa: E402
from exporter.choose.budgets.judges import Judges  # noqa: E402
from exporter.choose.budgets.limits import BETTER_ENDS, ENDS, rung_of  # noqa: E402
from exporter.choose.budgets.trial_runs import TrialRuns, figures_of  # noqa: E402
from exporter.compare.intervals import mean_interval, share_interval  # noqa: E402
from exporter.heal.domains import _told  # noqa: E402
from exporter.models.ablation.damage import (  # noqa: E402
    SIMILARITY,
    ClassDamage,
    Damage,
)
from exporter.models.ablation.embeddings import EmbeddingReference  # noqa: E402
from exporter.models.texts.calibration import CalibrationText  # noqa: E402
from tests.tiny_models import tiny_loaded, tiny_tokenizer  # noqa: E402

FOLD: dict[str, Any] = {"kind": "fold", "samples": 24, "sequence_length": 24}


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


def test_a_healed_cut_is_judged_by_the_intervals_of_comparisons() -> None:
    sizes = (36, 2, 1, 1)
    rng, documents = np.random.default_rng(0), np.repeat(np.arange(4), sizes)
    kept, rises = rng.integers(2, 9, 40) * 1.0, rng.exponential(size=40)
    ones, tokens = np.ones(40), np.full(40, 8.0)
    whole, other = (torch.from_numpy(rng.normal(size=(40, 8))) for _ in range(2))
    of_answers = Damage(tokens, 0 * ones, kept, rises, 0 * ones)
    of_texts = EmbeddingReference(whole).damage(whole + other)
    text = replace(
        CalibrationText.unpadded(np.ones((40, 8), np.int64), "t", "0" * 64), documents=documents
    )
    healed: dict[str, float] = {}
    for damage in (of_answers, of_texts):
        made: Any = SimpleNamespace(measured=[_told("calibration", text, [damage], [damage])])
        healed |= figures_of(made)[1]
    result = {
        "log_perplexity_increase": mean_interval(rises, tokens, documents),
        "top1_agreement": share_interval(kept, tokens, documents),
        "cosine": mean_interval(of_texts.cosines, ones, documents),
        SIMILARITY: mean_interval(of_texts.correlations, ones, documents),
    }
    for name, interval in result.items():
        ends = sorted((healed[ENDS[name]], healed[BETTER_ENDS[name]]))
        assert interval is not None
        assert ends == pytest.approx(interval.ci95), name


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
    options = HealOptions(**FOLD, calibration=(str(text),))
    runs = TrialRuns(model, options, Floors(top1_agreement=0.88), tmp_path / FOLDER)
    choosing, judging = runs.texts.halves
    assert texts <= len(judging.input_ids) <= texts + 4  # documents stay whole
    assert 28 <= len(choosing.input_ids) <= 32
    assert len(runs.texts.fitting.input_ids) > 24


def test_cuts_that_others_of_the_held_out_texts_judged_are_not_found_again(tmp_path: Path) -> None:
    words = [f"w{n}" for n in np.random.default_rng(0).integers(0, 60, 1600)]
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(words[n : n + 20]) for n in range(0, 1600, 20)))
    model = tiny_loaded(
        "bert", tiny_tokenizer(special_ends=True), head="SequenceClassification", num_labels=3
    )
    options = HealOptions(**FOLD, calibration=(str(text),))

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
    result = "1,476", "--min-top1-agreement 0.999 "  # texts of five answers each
    with raises(PlanError, "too-near-to-1", *result):
        Judges.of(Floors(top1_agreement=0.9995), classifier(5, **separate))
