"""What takes the places of an encoder-decoder's branches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from exporter.artifacts import PlannedDeletion, PruningPlan
from exporter.heal.encoder_decoder import heal_stacks
from exporter.heal.options import HealOptions
from exporter.models.ablation.branch_replacements import NOTHING
from exporter.models.ablation.embeddings import meter_here
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.paired import PairReader, paired_text
from exporter.models.texts.pairs import read_pairs
from exporter.models.texts.sources import Part
from tests.exporter.encoder_decoders import made_loaded

pytestmark = pytest.mark.torch


def noise(loaded: Any, part: Part, number: int) -> CalibrationText:
    reader, rng = PairReader.of(loaded), np.random.default_rng(number)
    pairs = read_pairs("random", part=part, sound=reader.hears)

    def generate(sources: Any) -> Any:
        (size, *_), *_ = (array.shape for array in sources.values())
        return rng.integers(6, 64, (size, 20))

    return paired_text(reader, pairs, generate, number=number, part=part)


@pytest.mark.parametrize("family", ["whisper", "bart"])
def test_a_healed_cut_answers_nearer_to_the_whole_model_than_a_bare_one(family: str) -> None:
    loaded = made_loaded(family)
    fitted, judged = noise(loaded, "calibration", 24), noise(loaded, "evaluation", 8)
    plan = PruningPlan(
        deletions=[
            PlannedDeletion(layer=layer, kind=kind)
            for layer, kind in ((1, "mlp"), (2, "attention"), (3, "cross_attention"))
        ],
        encoder_layers=2,
    )
    healed = heal_stacks(loaded, plan, fitted, HealOptions(kind="best")).branch_replacements
    meter: Any = meter_here(loaded, judged)
    bare, better = (
        meter.measure(cut).distance for cut in (dict.fromkeys(healed, NOTHING), dict(healed))
    )
    assert better < bare
