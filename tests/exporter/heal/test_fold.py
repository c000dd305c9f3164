"""Folding into the last products of kept branches, on tiny models of several families."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_families import hook_count, tiny_loaded

from exporter.artifacts import CalibrationRef
from exporter.errors import HealingError, OptionError
from exporter.heal.options import HealOptions
from exporter.models.texts.calibration import CalibrationText
from graph_passes.types import SublayerRef
from tests.raising import raises

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.heal.fitting import Fitting  # noqa: E402
from exporter.heal.fold.folded import folded  # noqa: E402
from exporter.heal.fold.places import places_of  # noqa: E402
from exporter.heal.texts import HealingTexts  # noqa: E402
from exporter.models.ablation.branch_replacements import NOTHING, branches_replaced  # noqa: E402
from exporter.models.anatomy.architectures import layer_modules  # noqa: E402
from exporter.progress import QUIET  # noqa: E402

ATTENTION, MLP = SublayerRef(1, "attention"), SublayerRef(2, "mlp")
BLOCK = [SublayerRef(1, "attention"), SublayerRef(1, "mlp")]


def text(samples: int = 24, length: int = 16, seed: int = 0) -> CalibrationText:
    ids = np.random.default_rng(seed).integers(3, 60, (samples, length))
    ref = CalibrationRef(
        source=f"test {seed}", samples=samples, sequence_length=length, tokens=ids.size,
        sha256=f"{seed}" * 64,
    )  # fmt: skip
    return CalibrationText(ref, ids, np.ones(ids.shape, dtype=np.bool_))


def fitting(loaded: Any, names: list[SublayerRef], **options: Any) -> Fitting:
    first = text(40)
    texts = HealingTexts(first, (first.ref,), (text(8, seed=1),), None)
    return Fitting(loaded, texts, names, HealOptions(kind="fold", **options), None, QUIET)


def logits(model: Any, ids: Any) -> Any:
    with torch.inference_mode():
        return model(torch.from_numpy(ids)).logits.double()


@pytest.mark.parametrize("family", ["llama", "granite", "gpt2", "opt", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("names", [[ATTENTION, MLP], BLOCK])
def test_answers_come_nearer_and_the_model_is_as_it_was(
    family: str, names: list[SublayerRef]
) -> None:
    loaded, judged = tiny_loaded(family), text(8, seed=2).input_ids
    before, hooks = logits(loaded.model, judged), hook_count(loaded.model)
    cut = dict.fromkeys(names, NOTHING)
    with branches_replaced(loaded.model, cut):
        bare = logits(loaded.model, judged)
    with folded(fitting(loaded, names)) as made:
        assert made.within is not None
        assert made.weights
        assert all(each is NOTHING for each in made.branch_replacements.values())
        with made.within(), branches_replaced(loaded.model, cut):
            healed = logits(loaded.model, judged)
    assert torch.equal(logits(loaded.model, judged), before)
    assert hook_count(loaded.model) == hooks
    assert (healed - before).square().mean() < 0.9 * (bare - before).square().mean()
