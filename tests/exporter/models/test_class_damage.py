"""Cut classifiers' classes against the whole one's, held against a plain forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_families import tiny_model

from exporter.errors import ScoringError
from exporter.heal.distill.student import Student
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    branches_replaced,
)
from exporter.models.ablation.damage import ClassDamage, Damage, EmbeddingDamage, damage_of_numbers
from exporter.models.ablation.embeddings import meter_of
from exporter.models.ablation.meter import judged_by
from exporter.models.texts.batches import batches_of
from tests.raising import raises

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

_IDS = np.random.default_rng(0).integers(3, 60, (5, 12))
_MASK = np.arange(12) < np.array([12, 7, 12, 3, 9])[:, None]
_CUT: Any = {(0, "attention"): NOTHING}


def _expected(model: Any, cut: Any) -> tuple[list[float], list[float]]:
    """KL divergence and agreement, summed over each text's rows, text by text without padding."""
    kls, same = [], []
    for ids, mask in zip(_IDS, _MASK, strict=True):
        given = torch.tensor(ids[mask])[None]
        with torch.no_grad():
            whole = model(given).logits[0].double()
            with branches_replaced(model, cut):
                other = model(given).logits[0].double()
        if whole.shape[-1] == 1:  # a yes against a no of logit 0
            whole, other = (torch.cat([0 * each, each], -1) for each in (whole, other))
        p, q = whole.log_softmax(-1), other.log_softmax(-1)
        kls.append(float((p.exp() * (p - q)).sum()))
        same.append(float((p.argmax(-1) == q.argmax(-1)).sum()))
    return kls, same


@pytest.mark.parametrize(
    "family",
    [
        {"model_type": "bert"},
        {"model_type": "roberta"},
        {"model_type": "distilbert"},
        {"model_type": "modernbert"},
        {"model_type": "llama", "pad_token_id": 2},  # answers at a text's last token
        {"model_type": "llama", "pad_token_id": None},
        {"model_type": "qwen3", "pad_token_id": -1},
    ],
)
@pytest.mark.parametrize(
    ("head", "classes"),
    [("SequenceClassification", 3), ("SequenceClassification", 1), ("TokenClassification", 4)],
)
def test_the_divergences_are_those_of_texts_alone(
    family: dict[str, Any], head: str, classes: int
) -> None:
    model = tiny_model(**family, head=head, num_labels=classes)
    padding = model.config.pad_token_id
    meter = meter_of(model, _IDS, _MASK, batch_size=2)
    others: list[Any] = [{**_CUT, (1, "mlp"): NOTHING}, {(2, "mlp"): NOTHING}]
    for damage, cut in zip(meter.measure_many(_CUT, others), [_CUT, *others], strict=True):
        kls, same = _expected(model, cut)
        assert damage.kl_sums.tolist() == pytest.approx(kls, abs=1e-5)  # float32, padded in batches
        assert damage.agreements.tolist() == same
        assert damage.distance == damage.kl > 1e-5
    rows = _MASK.sum(1) if head == "TokenClassification" else np.ones(5)
    assert damage.positions.tolist() == rows.tolist()
    assert model.config.pad_token_id == padding


@pytest.mark.parametrize("padding", [2, None])
def test_a_student_answers_padded_texts_as_texts_alone(padding: int | None) -> None:
    model = tiny_model("llama", head="SequenceClassification", pad_token_id=padding)
    student = Student(model, {}, "all", None)
    (batch,) = batches_of(_IDS, _MASK, 5)
    with torch.no_grad():
        alone = [
            model(torch.tensor(ids[mask])[None]).logits[0]
            for ids, mask in zip(_IDS, _MASK, strict=True)
        ]
    assert torch.allclose(student.teach(batch.inputs()).given, torch.stack(alone), atol=1e-5)


def test_nothing_cut_costs_nothing() -> None:
    damage = meter_of(tiny_model("bert", head="SequenceClassification"), _IDS, _MASK).measure({})
    assert damage.kl == pytest.approx(0, abs=1e-7)
    assert damage.top1_agreement == 1


@pytest.mark.parametrize(
    ("family", "head", "judged", "kind"),
    [
        ("bert", "", "embeddings", EmbeddingDamage),
        ("bert", "SequenceClassification", "classes", ClassDamage),
        ("bert", "TokenClassification", "classes", ClassDamage),
        ("llama", "", "tokens", Damage),
    ],
)
def test_what_is_measured_goes_by_the_model_and_is_read_again(
    family: str, head: str, judged: str, kind: type
) -> None:
    model = tiny_model(family, head=head)
    assert judged_by(model) == judged
    damage = meter_of(model, _IDS, _MASK).measure(_CUT)
    assert type(damage) is kind
    again = damage_of_numbers({name: each.tolist() for name, each in vars(damage).items()})
    assert type(again) is kind
    assert again.distance == damage.distance


def test_a_classifier_is_judged_by_embeddings_if_they_are_asked_for() -> None:
    model = tiny_model("bert", head="SequenceClassification")
    meter = meter_of(model, _IDS, _MASK, embeds=True)
    assert isinstance(meter.measure(_CUT), EmbeddingDamage)


def test_classes_that_are_not_finite() -> None:
    nan = torch.full((32,), float("nan"))
    meter = meter_of(tiny_model("bert", head="SequenceClassification"), _IDS, _MASK)
    with raises(ScoringError, "not-finite", 0, "mlp 1"):
        meter.measure({(1, "mlp"): BranchReplacement(nan)})
