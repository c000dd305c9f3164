"""Models of every kind are healed by what they answer, in the way that the machine allows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import PlannedDeletion, PruningPlan
from exporter.errors import HealingError
from exporter.heal.options import HealOptions
from exporter.models.changed_weights import change_weights
from exporter.models.texts.calibration import CalibrationText, calibration_text
from exporter.models.texts.pairs import PairReader, paired_text, read_pairs
from exporter.models.texts.sources import Part
from tests.raising import raises
from tests.tiny_models import (
    made_loaded,
    planned,
    skipped,
    tiny_loaded,
    tiny_tokenizer,
    write_images,
    write_processor,
    write_words,
)

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
pytest.importorskip("torch")

from exporter.heal.automatic import USUAL_TIME_S, settled  # noqa: E402
from exporter.heal.healed import heal  # noqa: E402
from exporter.heal.texts import healing_texts, texts_of_pairs  # noqa: E402
from exporter.models.ablation.branch_replacements import NOTHING, branches_replaced  # noqa: E402
from exporter.models.sentence_folder import MEAN  # noqa: E402
from exporter.models.tasks import Classes, Embeddings, meter_here  # noqa: E402
from exporter.report.sections.healing import healing_grid  # noqa: E402

PLAN = PruningPlan(deletions=planned(("attention", 1, "none"), ("mlp", 2, "none")))
NAMES = [(1, "attention"), (2, "mlp")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    return write_words(path, 60 * 22, seed=0, each=(14, 30))


def loaded_bert(labels: int | None = None) -> Any:
    head = {} if labels is None else {"head": "SequenceClassification", "num_labels": labels}
    loaded = tiny_loaded("bert", tiny_tokenizer(special_ends=True), **head)
    if labels is not None:
        loaded.model.classifier.weight.mul_(10)  # so that texts differ, not the bias alone
    return loaded


def options(text: str, kind: Any, **more: Any) -> HealOptions:
    return HealOptions(kind=kind, calibration=(text,), samples=40, sequence_length=40, **more)


def divergence(whole: Any, other: Any) -> float:
    log_p, log_q = whole.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def measured(texts: CalibrationText, whole: Any, cut: Any, within: Any) -> float:
    """The cosine of embeddings, or the divergence of classes, of texts that run one at a time.

    Of single logits over each two texts, by their difference.
    """
    rows = []
    for ids, mask in zip(texts.input_ids, texts.mask, strict=True):
        given = torch.tensor(ids[mask])[None]
        with torch.no_grad():
            one = whole(given)
            with within():
                rows.append((one, cut(given)))
    if not hasattr(rows[0][0], "logits"):
        pairs = [[item.last_hidden_state[0].double().mean(0) for item in row] for row in rows]
        return float(np.mean([torch.cosine_similarity(*pair, dim=0) for pair in pairs]))
    both = [torch.cat([item.logits for item in items]) for items in zip(*rows, strict=True)]
    if both[0].shape[1] == 1:
        both = [torch.cat([0 * item[::2], item[::2] - item[1::2]], 1) for item in both]
    return divergence(*both)


@pytest.mark.parametrize(
    ("labels", "how"),
    [
        (None, {"kind": "distill", "train": "adapters", "learning_rate": 1e-2}),
        (None, {"kind": "distill", "train": "all", "learning_rate": 1e-3}),
        (3, {"kind": "distill", "train": "all", "learning_rate": 1e-3}),
        (1, {"kind": "distill", "train": "all", "learning_rate": 1e-3}),
        (None, {"kind": "best"}),
        (3, {"kind": "best"}),
    ],
)
def test_healing_brings_back_what_the_model_answers(
    text: str, labels: int | None, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.heal.texts._other_spec", lambda *_: None)
    loaded, trains = loaded_bert(labels), how["kind"] == "distill"
    more = {"tokens": 4000, "step_tokens": 100} if trains else {}
    asked = options(text, **how, **more)
    result = heal(loaded, PLAN, asked)
    healing, predicted = result.report.healing, result.plan.predicted
    (own,) = healing.texts
    expected = {key: figure.healed for key, figure in own.figures.items()}
    assert expected.keys() == (
        {"cosine", "similarity_correlation"} if labels is None else {"kl", "top1_agreement"}
    )
    first = own.kind.figures[0]
    values = own.figures[first.key].dropped, own.figures[first.key].healed
    # Of a single logit the training's error is not only one of the order.
    least = 0.25 * first.loss(values[0]) * trains
    if labels is not None:
        kl, same = healing_grid(healing).rows
        assert float(kl[4].split()[0]) == pytest.approx(values[1], rel=0.01)  # three digits
        assert float(same[2].split()[0]) == 100
    assert predicted == expected
    assert own.gain == pytest.approx(abs(values[1] - values[0]))
    assert labels == 1 or abs(values[1] - values[0]) > least
    assert labels == 1 or (values[1] > values[0]) is (labels is None)
    if trains:
        losses = [check.held_out_loss for check in healing.training.checks]
        assert min(losses) < (1.0 if labels is None else 0.75) * losses[0]
        assert healing.training.loss == ("embeddings" if labels is None else "classes")
        on = result.plan.fitted_on, result.plan.stopped_on, result.plan.judged_on
        assert len({part.ids_sha256 for parts in on for part in parts}) == 3
    judged, whole = healing_texts(loaded, asked).halves[1], loaded_bert(labels).model
    bare = measured(judged, whole, loaded.model, lambda: skipped(loaded.model, NAMES))
    assert values[0] == pytest.approx(bare, abs=1e-5)  # float32
    change_weights(loaded.model, result.weights)
    cut = result.branch_replacements
    after = measured(judged, whole, loaded.model, lambda: branches_replaced(loaded.model, cut))
    assert values[1] == pytest.approx(after, abs=1e-4)  # adapters are merged in float32


def test_the_loss_of_classes_is_their_divergence_and_of_a_single_logit_its_error() -> None:
    torch.manual_seed(0)
    task, of_labels = Classes(None), Classes(None)
    task.separate, of_labels.separate = False, True
    mask = torch.tensor([[True, True], [True, False]])
    student, teacher = torch.randn(2, 2, 3).unbind()
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert float(task.loss(student, teacher, mask)) == pytest.approx(float(kl.mean()), abs=1e-6)
    by_token = [item.expand(2, 2, 3).clone() for item in (student, teacher)]
    by_token[0][1, 1] = 100.0  # padding
    result = float(task.loss(*by_token, mask))  # both texts have the rows as tokens
    assert result == pytest.approx(float(2 * kl[0] + kl[1]) / 3, abs=1e-6)
    one, other = student[:, :1], teacher[:, :1]
    error = float(((one - other) ** 2).mean() / 2)
    assert float(task.loss(one, other, mask)) == pytest.approx(error, abs=1e-6)
    p, q = teacher.sigmoid(), student.sigmoid()  # of separate labels that of each
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    result = float(of_labels.loss(student, teacher, mask))
    assert result == pytest.approx(float(kl.mean()), abs=1e-6)


def test_the_loss_is_that_of_the_mean_states() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 4, 8).unbind()
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    rows = [
        torch.cosine_similarity(student[n, :long].mean(0), teacher[n, :long].mean(0), dim=0)
        for n, long in enumerate((4, 2))
    ]
    expected, task = 1 - (rows[0] + rows[1]) / 2, Embeddings(None)
    task.pooling = MEAN
    assert float(task.loss(student, teacher, mask)) == pytest.approx(float(expected), abs=1e-6)
    assert float(task.loss(teacher, teacher, mask)) == pytest.approx(0, abs=1e-6)


def image_classifier(model_type: str = "vit") -> Any:
    prefix = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2"}[model_type]
    head = {"head": "ImageClassification", "num_labels": 6}
    loaded = tiny_loaded(model_type, architectures=[f"{prefix}ForImageClassification"], **head)
    loaded.model.classifier.weight.mul_(4)
    return loaded


def image_logits(loaded: Any, text: Any) -> Any:
    pixels = torch.from_numpy(text.sources.arrays["pixel_values"])
    with torch.inference_mode():
        return loaded.model(pixel_values=pixels).logits


def test_a_block_of_the_decoder_is_healed_in_three_places_and_one_pair_is_too_few() -> None:
    loaded, asked = made_loaded("bart"), HealOptions(kind="bias")
    plan = plan_of((0, "block"), (2, "block"))
    texts = texts_of_pairs(noise(loaded, "calibration", 5))
    healed = heal(loaded, plan, asked, texts=texts)
    assert [(one.layer, one.kind, one.replacement) for one in healed.plan.deletions] == [
        (0, "attention", "bias"), (0, "mlp", "bias"),
        (2, "attention", "bias"), (2, "cross_attention", "bias"), (2, "mlp", "bias"),
    ]  # fmt: skip
    assert healed.plan.encoder_layers == 2
    with raises(HealingError, "too-few-samples", "random"):
        texts_of_pairs(noise(loaded, "calibration", 1))


@pytest.mark.parametrize("model_type", ["vit", "deit", "dinov2"])
def test_a_cut_is_measured_by_its_classes(model_type: str) -> None:
    loaded = image_classifier(model_type)
    text = calibration_text(loaded, samples=6)
    cuts: list[Any] = [{(0, "attention"): NOTHING}, {(1, "mlp"): NOTHING, (2, "mlp"): NOTHING}]
    many = meter_here(loaded, text, 4).measure_many({}, cuts)
    whole = image_logits(loaded, text)
    assert many[0].kl == pytest.approx(0, abs=1e-9)  # type: ignore[union-attr]
    for cut, damage in zip(cuts, many[1:], strict=True):
        with skipped(loaded.model, cut):
            other = image_logits(loaded, text)
        assert damage.kl == pytest.approx(divergence(whole, other), rel=1e-3)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "how",
    [
        {"kind": "best"},
        {"kind": "fold"},
        {"kind": "linear"},
        {"kind": "distill", "tokens": 4000, "step_tokens": 40, "train": "all"},
    ],
)
def test_healing_is_measured_on_the_model_that_it_makes(how: dict[str, Any]) -> None:
    loaded = image_classifier()
    options = HealOptions(samples=16, sequence_length=5, calibration=("random",), **how)
    healed = heal(loaded, PLAN, options)
    [result] = healed.report.healing.texts
    assert "noise" in result.text.source
    texts = healing_texts(loaded, options)
    text = texts.halves[1] if how["kind"] != "linear" else texts.held_out
    whole = image_logits(loaded, text)
    with skipped(loaded.model, NAMES):
        dropped = image_logits(loaded, text)
    change_weights(loaded.model, healed.weights)
    with branches_replaced(loaded.model, healed.branch_replacements):
        other = image_logits(loaded, text)
    assert result.figures["kl"].dropped == pytest.approx(divergence(whole, dropped), rel=1e-3)
    assert result.figures["kl"].healed == pytest.approx(divergence(whole, other), rel=1e-3)
    assert result.figures["kl"].healed < result.figures["kl"].dropped


@pytest.mark.parametrize(("chosen", "again"), [(12, False), (16, True)])
def test_what_chose_is_not_fitted_on_again_where_few_are_held_out(
    tmp_path: Path, chosen: int, again: bool
) -> None:
    loaded = image_classifier()
    write_processor(tmp_path)
    loaded = replace(loaded, path=tmp_path)
    spec = str(write_images(tmp_path / "images", 30))
    whole = calibration_text(loaded, spec, samples=30)
    options = HealOptions(samples=32, calibration=(spec,))
    texts = healing_texts(loaded, options, chosen_on=[whole.rows(slice(0, chosen)).ref])
    assert bool(texts.again) is again
    rest = whole.rows(slice(0 if again else chosen, 30 - len(texts.held_out.input_ids)))
    assert texts.fitting.ids_sha256 == rest.ids_sha256
    assert len(texts.held_out.input_ids) == (6 if again else 3)


def noise(loaded: Any, part: Part, number: int) -> CalibrationText:
    reader, rng = PairReader.of(loaded), np.random.default_rng(number)
    pairs = read_pairs("random", part=part, sound=reader.hears)

    def generate(sources: Any) -> Any:
        (size, *_), *_ = (array.shape for array in sources.values())
        return rng.integers(6, 64, (size, 20))

    return paired_text(reader, pairs, generate, number=number, part=part)


def plan_of(*dropped: tuple[int, Any]) -> PruningPlan:
    deletions = [PlannedDeletion(layer=layer, kind=kind) for layer, kind in dropped]
    return PruningPlan(deletions=deletions, encoder_layers=2)


@pytest.mark.parametrize("family", ["whisper", "bart"])
def test_a_healed_cut_answers_nearer_to_the_whole_model_than_a_bare_one(family: str) -> None:
    loaded = made_loaded(family)
    plan = plan_of((1, "mlp"), (2, "attention"), (3, "cross_attention"))
    texts = texts_of_pairs(noise(loaded, "calibration", 30))
    healed = heal(loaded, plan, HealOptions(kind="best"), texts=texts)
    (result,) = healed.report.healing.texts
    assert (result.role, result.text.samples) == ("calibration", 3)
    assert [part.samples for part in healed.plan.fitted_on] == [24]
    assert [part.samples for part in healed.plan.stopped_on] == [3]
    meter: Any = meter_here(loaded, noise(loaded, "evaluation", 8))
    branch_replacements = healed.branch_replacements
    bare, better = (
        meter.measure(cut).kl
        for cut in (dict.fromkeys(branch_replacements, NOTHING), branch_replacements)
    )
    assert better < bare
    assert (
        result.figures["kl"].healed < result.figures["kl"].dropped == pytest.approx(bare, rel=0.5)
    )


@pytest.mark.parametrize(
    ("free_bytes", "rate", "kind"),
    [(1 << 40, 1e12, "distill"), (1 << 10, 1e12, "fold"), (1 << 40, 1.0, "fold")],
)
def test_what_a_machine_can_not_afford_is_not_trained(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int, rate: float, kind: str
) -> None:
    monkeypatch.setattr("exporter.heal.automatic.available_bytes", lambda: free_bytes)
    monkeypatch.setattr("exporter.heal.automatic._RATES", {"cpu": rate, "cuda": rate})
    heal_options = HealOptions(kind="auto", tokens=1000)
    result = settled(heal_options, tiny_loaded("llama"))
    assert result.kind == kind
    assert result.time_s == (USUAL_TIME_S if kind == "distill" else None)
    assert result.tokens == (1000 if kind == "distill" else HealOptions().tokens)
