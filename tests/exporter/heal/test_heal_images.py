"""Classifiers of images are chosen and healed by their classes, as those of texts are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import PruningPlan
from exporter.heal.options import HealOptions
from exporter.models.ablation.branch_replacements import NOTHING, branches_replaced
from exporter.models.changed_weights import change_weights
from exporter.models.texts.calibration import calibration_text
from tests.tiny_models import planned, skipped, tiny_loaded, write_images, write_processor

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.heal.healed import heal  # noqa: E402
from exporter.heal.texts import healing_texts  # noqa: E402
from exporter.models.ablation.embeddings import meter_here  # noqa: E402

PLAN = PruningPlan(deletions=planned(("attention", 1, "none"), ("mlp", 2, "none")))
NAMES = [(1, "attention"), (2, "mlp")]


_CLASSES = {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
}


def classifier(model_type: str = "vit") -> Any:
    loaded = tiny_loaded(
        model_type,
        head="ImageClassification",
        num_labels=6,
        architectures=[_CLASSES[model_type]],
    )
    loaded.model.classifier.weight.mul_(4)
    return loaded


def divergence(whole: Any, other: Any) -> float:
    log_p, log_q = whole.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def logits(loaded: Any, text: Any) -> Any:
    with torch.inference_mode():
        return loaded.model(
            pixel_values=torch.from_numpy(text.sources.arrays["pixel_values"])
        ).logits


@pytest.mark.parametrize("model_type", ["vit", "deit", "dinov2"])
def test_a_cut_is_measured_by_its_classes(model_type: str) -> None:
    loaded = classifier(model_type)
    text = calibration_text(loaded, samples=6)
    cuts: list[Any] = [{(0, "attention"): NOTHING}, {(1, "mlp"): NOTHING, (2, "mlp"): NOTHING}]
    many = meter_here(loaded, text, 4).measure_many({}, cuts)
    whole = logits(loaded, text)
    assert many[0].kl == pytest.approx(0, abs=1e-9)  # type: ignore[union-attr]
    for cut, damage in zip(cuts, many[1:], strict=True):
        with skipped(loaded.model, cut):
            other = logits(loaded, text)
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
    loaded = classifier()
    options = HealOptions(samples=16, sequence_length=5, calibration=("random",), **how)
    healed = heal(loaded, PLAN, options)
    [result] = healed.report.healing.classes
    assert "noise" in result.text.source
    texts = healing_texts(loaded, options)
    text = texts.halves[1] if how["kind"] != "linear" else texts.held_out
    whole = logits(loaded, text)
    with skipped(loaded.model, NAMES):
        dropped = logits(loaded, text)
    change_weights(loaded.model, healed.weights)
    with branches_replaced(loaded.model, healed.branch_replacements):
        other = logits(loaded, text)
    assert result.dropped_kl == pytest.approx(divergence(whole, dropped), rel=1e-3)
    assert result.healed_kl == pytest.approx(divergence(whole, other), rel=1e-3)
    assert result.healed_kl < result.dropped_kl


@pytest.mark.parametrize(("chosen", "again"), [(12, False), (16, True)])
def test_what_chose_is_not_fitted_on_again_where_few_are_held_out(
    tmp_path: Path, chosen: int, again: bool
) -> None:
    loaded = classifier()
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
