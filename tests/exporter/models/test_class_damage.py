"""Cut classifiers' classes against the whole one's, held against a plain forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from exporter.heal.distill.student import Student
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    branches_replaced,
)
from exporter.models.ablation.damage import ClassDamage, Damage, EmbeddingDamage, damage_of_numbers
from exporter.models.ablation.embeddings import MULTI_LABEL, meter_of
from exporter.models.ablation.meter import judged_by
from exporter.models.texts.samples import batches_of
from exporter.score.cluster.meter import ClusterMeter
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

_IDS = np.random.default_rng(0).integers(3, 60, (5, 12))
_MASK = np.arange(12) < np.array([12, 7, 12, 3, 9])[:, None]
_CUT: Any = {(0, "attention"): NOTHING}


def _logits(model: Any) -> list[Any]:
    """Of each text by itself, without padding: ``[classes]`` or ``[tokens, classes]``."""
    with torch.no_grad():
        return [
            model(torch.tensor(ids[mask])[None]).logits[0].double()
            for ids, mask in zip(_IDS, _MASK, strict=True)
        ]


def _rows(logits: list[Any], head: str, kind: str | None) -> list[Any]:
    """Of each text what is compared: ``[positions, classes]``."""
    if head == "TokenClassification":
        return logits
    if kind == MULTI_LABEL:
        return [torch.stack([0 * logit, logit], -1) for logit in logits]
    if len(logits[0]) > 1:
        return [logit[None] for logit in logits]
    pairs = [logits[0] - logits[1], logits[2] - logits[3], logits[4]]  # in batches of two
    rows = [torch.cat([0 * pair, pair])[None] for pair in pairs]
    return [rows[0], rows[0][:0], rows[1], rows[1][:0], rows[2]]


def _expected(model: Any, cut: Any, value: Any) -> tuple[list[float], list[float]]:
    """KL divergence and agreement, summed over each text's rows."""
    whole = _rows(_logits(model), *value)
    with branches_replaced(model, cut):
        other = _rows(_logits(model), *value)
    pairs = [
        (one.log_softmax(-1), item.log_softmax(-1)) for one, item in zip(whole, other, strict=True)
    ]
    kls = [float((p.exp() * (p - q)).sum()) for p, q in pairs]
    return kls, [float((p.argmax(-1) == q.argmax(-1)).sum()) for p, q in pairs]


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
    ("head", "classes", "kind"),
    [
        ("SequenceClassification", 3, None),
        ("SequenceClassification", 3, MULTI_LABEL),
        ("SequenceClassification", 1, None),
        ("TokenClassification", 4, None),
    ],
)
def test_the_divergences_are_those_of_texts_alone(
    family: dict[str, Any], head: str, classes: int, kind: str | None
) -> None:
    model = tiny_model(**family, head=head, num_labels=classes, problem_type=kind)
    padding = model.config.pad_token_id
    meter = meter_of(model, _IDS, _MASK, batch_size=2)
    others: list[Any] = [{**_CUT, (1, "mlp"): NOTHING}, {(2, "mlp"): NOTHING}]
    for damage, cut in zip(meter.measure_many(_CUT, others), [_CUT, *others], strict=True):
        kls, same = _expected(model, cut, (head, kind))
        assert damage.kl_sums.tolist() == pytest.approx(kls, abs=1e-5)  # float32, padded in batches
        assert damage.agreements.tolist() == same
        assert damage.distance == damage.kl > 1e-5
    rows = [len(row) for row in _rows(_logits(model), head, kind)]
    assert damage.positions.tolist() == rows
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


def test_an_order_that_changes_is_seen_beside_a_large_bias() -> None:
    model = tiny_model("bert", head="SequenceClassification", num_labels=1)
    cut: Any = {(n, kind): NOTHING for n in range(3) for kind in ("attention", "mlp")}
    before = meter_of(model, _IDS[:4], _MASK[:4]).measure(cut)
    model.classifier.bias -= 50
    damage = meter_of(model, _IDS[:4], _MASK[:4]).measure(cut)
    assert damage.kl == pytest.approx(before.kl, rel=1e-3)  # type: ignore[union-attr]
    assert damage.kl > 1e-4  # type: ignore[union-attr]


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_two_texts_that_a_reranker_orders_are_in_one_batch_of_any_size(
    batch_size: int, told: bool
) -> None:
    model = tiny_model("bert", head="SequenceClassification", num_labels=1)
    texts = (_IDS[:4], _MASK[:4])
    types = np.zeros_like(_IDS[:4]) if told else None
    whole, result = (
        meter_of(model, *texts, batch_size=size, types=types).measure(_CUT)
        for size in (4, batch_size)
    )
    assert vars(result)["positions"].tolist() == [1, 0, 1, 0]
    assert result.distance == pytest.approx(whole.distance, rel=1e-5)


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
    again = damage_of_numbers({name: var.tolist() for name, var in vars(damage).items()})
    assert type(again) is kind
    assert again.distance == damage.distance


class _Here:
    """A group of one worker in this process."""

    workers = 1

    def __init__(self, meter: Any) -> None:
        self._meter = meter

    def run(self, work: Any, jobs: Any) -> Any:
        return [(number, work(self._meter, job)) for number, job in enumerate(jobs)]


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize(
    ("family", "head", "classes"),
    [("bert", "SequenceClassification", 1), ("bert", "SequenceClassification", 3), ("bert", "", 2),
     ("llama", "CausalLM", 2)],
)  # fmt: skip
def test_workers_measure_the_batches_that_their_model_has(
    family: str, head: str, classes: int, size: int
) -> None:
    model = tiny_model(family, head=head, num_labels=classes)
    types = np.zeros_like(_IDS) if classes == 1 else None
    meter = meter_of(model, _IDS, _MASK, batch_size=size, types=types)
    spread = ClusterMeter(_Here(meter), 3)  # type: ignore[arg-type]
    (damage,) = spread.measure_many(_CUT, [])
    assert damage.distance == meter.measure(_CUT).distance
