"""Encoders are healed by what their embeddings lose; held against plain forward passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from exporter.artifacts import PruningPlan
from exporter.heal.options import HealOptions
from exporter.models.ablation.branch_replacements import branches_replaced
from exporter.models.changed_weights import change_weights
from exporter.models.texts.calibration import CalibrationText
from graph_passes.types import SublayerRef
from tests.tiny_models import planned, skipped, tiny_loaded, tiny_tokenizer

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.heal.distill.student import Student  # noqa: E402
from exporter.heal.distill.teacher import Lesson, Teacher, class_loss, embedding_loss  # noqa: E402  # noqa: E402
from exporter.heal.domains import measured_text  # noqa: E402
from exporter.heal.healed import heal  # noqa: E402
from exporter.heal.texts import healing_texts  # noqa: E402
from exporter.models.ablation.branch_replacements import NOTHING  # noqa: E402
from exporter.report.sections.healing import healing_grid  # noqa: E402

PLAN = PruningPlan(deletions=planned(("attention", 1, "none"), ("mlp", 2, "none")))
NAMES = [(1, "attention"), (2, "mlp")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    paragraphs = [
        " ".join(f"w{n}" for n in rng.integers(0, 60, rng.integers(14, 30))) for _ in range(60)
    ]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(paragraphs))
    return str(path)


@pytest.fixture(autouse=True)
def no_other_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.heal.texts._other_spec", lambda *_: None)


def loaded_encoder() -> Any:
    return tiny_loaded("bert", tiny_tokenizer(special_ends=True))


def loaded_classifier(**changes: Any) -> Any:
    tokenizer = tiny_tokenizer(special_ends=True)
    loaded = tiny_loaded("bert", tokenizer, head="SequenceClassification", **changes)
    loaded.model.classifier.weight.mul_(10)  # so that texts differ, not the bias alone
    return loaded


def options(text: str, kind: Any, **more: Any) -> HealOptions:
    return HealOptions(kind=kind, calibration=(text,), samples=40, sequence_length=40, **more)


def healed(text: str, kind: Any, loaded: Any, **more: Any) -> Any:
    return heal(loaded, PLAN, options(text, kind, **more))


def cosine(texts: CalibrationText, whole: Any, cut: Any, within: Any) -> float:
    """Mean over texts, one at a time."""
    result = []
    for ids, mask in zip(texts.input_ids, texts.mask, strict=True):
        given = torch.tensor(ids[mask])[None]
        with torch.no_grad():
            one = whole(given).last_hidden_state[0].double().mean(0)
            with within():
                other = cut(given).last_hidden_state[0].double().mean(0)
        result.append(float(torch.cosine_similarity(one, other, dim=0)))
    return float(np.mean(result))


def divergence(texts: CalibrationText, whole: Any, cut: Any, within: Any) -> float:
    """Mean over texts, one at a time; of single logits over each two texts, by their difference."""
    result, given = [], []
    for ids, mask in zip(texts.input_ids, texts.mask, strict=True):
        text = torch.tensor(ids[mask])[None]
        with torch.no_grad():
            one = whole(text).logits[0].double()
            with within():
                given.append((one, cut(text).logits[0].double()))
    if len(given[0][0]) == 1:
        assert len(given) % 2 == 0
        pairs = zip(given[::2], given[1::2], strict=True)
        given = [
            tuple(torch.cat([torch.zeros(1), a - b]) for a, b in zip(*two, strict=True))
            for two in pairs
        ]
    for one, other in given:
        p = one.log_softmax(0)
        result.append(float((p.exp() * (p - other.log_softmax(0))).sum()))
    return float(np.mean(result))


@pytest.mark.parametrize("train", ["adapters", "all"])
def test_a_training_brings_embeddings_back(text: str, train: Any) -> None:
    loaded = loaded_encoder()
    rate = {"adapters": 1e-2, "all": 1e-3}[train]
    result = healed(
        text, "distill", loaded, train=train, tokens=4000, step_tokens=100, learning_rate=rate
    )
    healing = result.report.healing
    assert healing.texts == []
    (own,) = healing.embeddings
    assert own.gain == pytest.approx(own.healed - own.dropped)
    assert own.healed > own.dropped + 0.25 * (1 - own.dropped)
    assert healing.training.loss == "embeddings"
    assert min(check.held_out_loss for check in healing.training.checks) < (
        healing.training.checks[0].held_out_loss
    )
    expected = {"cosine": own.healed, "similarity_correlation": own.healed_correlation}
    assert result.plan.predicted == expected
    ids = [{part.ids_sha256 for part in parts} for parts in (
        result.plan.fitted_on, result.plan.stopped_on, result.plan.judged_on)]  # fmt: skip
    assert len(set.union(*ids)) == 3
    judged = healing_texts(loaded, options(text, "distill", tokens=4000)).halves[1]
    whole = loaded_encoder().model
    bare = cosine(judged, whole, loaded.model, lambda: skipped(loaded.model, NAMES))
    assert own.dropped == pytest.approx(bare, abs=1e-5)  # float32
    change_weights(loaded.model, result.weights)
    after = cosine(judged, whole, loaded.model, lambda: skipped(loaded.model, NAMES))
    assert own.healed == pytest.approx(after, abs=1e-4)  # adapters are merged in float32


@pytest.mark.parametrize("classes", [3, 1])
def test_a_training_brings_classes_back(text: str, classes: int) -> None:
    loaded = loaded_classifier(num_labels=classes)
    result = healed(
        text, "distill", loaded, train="all", tokens=4000, step_tokens=100, learning_rate=1e-3
    )
    healing = result.report.healing
    assert not healing.texts
    assert not healing.embeddings
    (own,) = healing.classes
    assert own.gain == pytest.approx(own.dropped_kl - own.healed_kl)
    losses = [check.held_out_loss for check in healing.training.checks]
    assert min(losses) < 0.75 * losses[0]
    if classes > 1:  # of a single logit the training's error is not only one of the order
        assert own.healed_kl < 0.75 * own.dropped_kl
    assert healing.training.loss == "classes"
    assert result.plan.predicted == {"kl": own.healed_kl, "top1_agreement": own.healed_same}
    judged = healing_texts(loaded, options(text, "distill", tokens=4000)).halves[1]
    whole = loaded_classifier(num_labels=classes).model
    bare = divergence(judged, whole, loaded.model, lambda: skipped(loaded.model, NAMES))
    assert own.dropped_kl == pytest.approx(bare, abs=1e-5)  # float32
    change_weights(loaded.model, result.weights)
    after = divergence(judged, whole, loaded.model, lambda: skipped(loaded.model, NAMES))
    assert own.healed_kl == pytest.approx(after, abs=1e-4)  # adapters are merged in float32


def test_a_reranker_s_texts_are_measured_two_at_a_time_at_least() -> None:
    loaded = loaded_classifier(num_labels=1)
    cut: Any = dict.fromkeys(NAMES, NOTHING)
    ids = np.random.default_rng(0).integers(4, 60, (6, 8))
    text = CalibrationText.unpadded(ids, "t", "0" * 64)
    sized = [
        measured_text(loaded.model, "calibration", text, cut, cut, batch_size=size)
        for size in (1, 2)
    ]
    assert sized[0] == sized[1]


def test_the_best_replacements_are_those_of_the_classes(text: str) -> None:
    healing = healed(text, "best", loaded_classifier()).report.healing
    (own,) = healing.classes
    assert own.healed_kl < own.dropped_kl
    kl, same = healing_grid(healing).rows
    assert float(kl[4]) == pytest.approx(own.healed_kl, rel=0.01)  # three digits
    assert same[2] == "100 %"


def test_the_loss_of_classes_is_their_divergence_and_of_a_single_logit_its_error() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[True, True], [True, False]])
    student, teacher = torch.randn(2, 2, 3).unbind()
    p = teacher.log_softmax(-1)
    kl = (p.exp() * (p - student.log_softmax(-1))).sum(-1)
    assert float(class_loss(student, teacher, mask)) == pytest.approx(float(kl.mean()), abs=1e-6)
    by_token = [item.expand(2, 2, 3).clone() for item in (student, teacher)]
    by_token[0][1, 1] = 100.0  # padding
    result = float(class_loss(*by_token, mask))  # both texts have the rows as tokens
    assert result == pytest.approx(float(2 * kl[0] + kl[1]) / 3, abs=1e-6)
    one, other = student[:, :1], teacher[:, :1]
    error = float(((one - other) ** 2).mean() / 2)
    assert float(class_loss(one, other, mask)) == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize(
    ("head", "weight"), [("SequenceClassification", 2), ("TokenClassification", 5), ("", 2)]
)
def test_a_lesson_counts_by_what_its_loss_is_averaged_over(head: str, weight: int) -> None:
    model = tiny_loaded("bert", head=head).model
    mask = np.array([[True, True, True], [True, True, False]])
    lesson = Lesson((0, 1), np.full((2, 3), 4), mask)
    assert Teacher(Student(model, {}, "all", None), keeps=False).weight(lesson) == weight


def test_the_loss_of_separate_labels_is_the_divergence_of_each() -> None:
    torch.manual_seed(0)
    mask = torch.ones((2, 4), dtype=torch.bool)
    student, teacher = torch.randn(2, 2, 3).unbind()
    p, q = teacher.sigmoid(), student.sigmoid()
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    result = float(class_loss(student, teacher, mask, separate=True))
    assert result == pytest.approx(float(kl.mean()), abs=1e-6)


def test_the_best_replacements_are_those_of_the_embeddings(text: str) -> None:
    loaded = loaded_encoder()
    result = healed(text, "best", loaded)
    (own,) = result.report.healing.embeddings
    assert own.healed > own.dropped
    judged = healing_texts(loaded, options(text, "best")).halves[1]
    after = cosine(
        judged,
        loaded_encoder().model,
        loaded.model,
        lambda: branches_replaced(loaded.model, result.branch_replacements),
    )
    assert own.healed == pytest.approx(after, abs=1e-5)  # float32


def test_the_loss_is_that_of_the_mean_states() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 4, 8).unbind()
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    rows = [
        torch.cosine_similarity(student[n, :long].mean(0), teacher[n, :long].mean(0), dim=0)
        for n, long in enumerate((4, 2))
    ]
    expected = 1 - (rows[0] + rows[1]) / 2
    assert float(embedding_loss(student, teacher, mask)) == pytest.approx(float(expected), abs=1e-6)
    assert float(embedding_loss(teacher, teacher, mask)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_reranker_s_nearness_does_not_hang_on_the_size_of_its_logits(scale: float) -> None:
    loaded = loaded_classifier(num_labels=1)
    loaded.model.classifier.weight.data *= scale
    loaded.model.classifier.bias.data *= scale
    ids = np.random.default_rng(0).integers(4, 60, (6, 8))
    lessons = Lesson.of(CalibrationText.unpadded(ids, "made", "0"), 3)
    student = Student(loaded.model, {SublayerRef(0, "attention"): NOTHING}, "all", None)
    teacher = Teacher(student, keeps=True)
    whole = torch.cat([teacher.answers(lesson)[0] for lesson in lessons])[:, 0].double()
    expected = 0.05 * float(whole.var(correction=0))
    assert teacher.nearness(expected, lessons) == pytest.approx(0.05, rel=1e-3)
    student.close()


def test_a_cut_that_is_near_is_trained_at_a_lower_rate() -> None:
    from exporter.heal.distill.training import usual_rate

    assert usual_rate("adapters", None, encodes=True) == 2e-3
    assert usual_rate("adapters", 5.0, encodes=True) == 2e-3
    assert usual_rate("adapters", 0.2, encodes=True) == usual_rate("adapters", 0.2) == 1e-3
    assert usual_rate("adapters", 0.05, encodes=True) == usual_rate("adapters", 0.05) == 5e-4
    assert usual_rate("adapters", 5.0) == 1e-3
    assert 0 < usual_rate("adapters", -1e-9) == usual_rate("adapters", 0.0) < 1e-5
