"""What takes the places of an encoder-decoder's branches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from exporter.artifacts import PlannedDeletion, PruningPlan
from exporter.errors import HealingError
from exporter.heal.healed import heal_stacks
from exporter.heal.options import HealOptions
from exporter.models.ablation.branch_replacements import NOTHING
from exporter.models.ablation.embeddings import meter_here
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.paired import PairReader, paired_text
from exporter.models.texts.pairs import read_pairs
from exporter.models.texts.sources import Part
from tests.raising import raises
from tests.tiny_models import made_loaded

pytestmark = pytest.mark.torch


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
    healed = heal_stacks(loaded, plan, noise(loaded, "calibration", 30), HealOptions(kind="best"))
    (result,) = healed.report.healing.texts
    assert (result.role, result.text.samples) == ("calibration", 6)
    assert [part.samples for part in healed.plan.fitted_on] == [24]
    meter: Any = meter_here(loaded, noise(loaded, "evaluation", 8))
    branch_replacements = healed.branch_replacements
    bare, better = (
        meter.measure(cut).kl
        for cut in (dict.fromkeys(branch_replacements, NOTHING), branch_replacements)
    )
    assert better < bare
    assert result.healed.kl < result.dropped.kl == pytest.approx(bare, rel=0.5)


def test_a_block_of_the_decoder_is_healed_in_three_places() -> None:
    loaded = made_loaded("bart")
    text, options = noise(loaded, "calibration", 5), HealOptions(kind="bias")
    healed = heal_stacks(loaded, plan_of((0, "block"), (2, "block")), text, options)
    deletions = healed.plan.deletions
    assert [(one.layer, one.kind, one.replacement) for one in deletions] == [
        (0, "attention", "bias"), (0, "mlp", "bias"),
        (2, "attention", "bias"), (2, "cross_attention", "bias"), (2, "mlp", "bias"),
    ]  # fmt: skip
    assert healed.plan.encoder_layers == 2


def test_one_pair_is_too_few() -> None:
    loaded = made_loaded("t5")
    with raises(HealingError, "too-few-pairs", "random"):
        heal_stacks(loaded, plan_of((1, "mlp")), noise(loaded, "calibration", 1), HealOptions())
