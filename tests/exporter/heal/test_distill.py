"""Training that lets the whole model teach the cut one, on tiny models of several families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from healed_models import planned
from tiny_families import hook_count, tiny_loaded

from exporter.artifacts import CalibrationRef, PruningPlan
from exporter.artifacts.plans.loaded import LoadedPlan
from exporter.heal.options import HealOptions
from exporter.models.texts.calibration import CalibrationText
from graph_passes.types import SublayerRef

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.heal.distill.distilled import distilled  # noqa: E402
from exporter.heal.fitting import Fitting  # noqa: E402
from exporter.heal.plan_file import write_healed_plan  # noqa: E402
from exporter.heal.texts import HealingTexts  # noqa: E402
from exporter.models.ablation.branch_replacements import (  # noqa: E402
    NOTHING,
    branches_replaced,
)
from exporter.models.changed_weights import change_weights  # noqa: E402

DROPPED = [SublayerRef(1, "attention"), SublayerRef(2, "mlp")]
IDS = torch.arange(3, 19)[None]


def text(samples: int = 24, length: int = 16, seed: int = 0) -> CalibrationText:
    ids = np.random.default_rng(seed).integers(3, 60, (samples, length))
    ref = CalibrationRef(
        source=f"test {seed}", samples=samples, sequence_length=length, tokens=ids.size,
        sha256=f"{seed}" * 64,
    )  # fmt: skip
    return CalibrationText(ref, ids, np.ones(ids.shape, dtype=np.bool_))


RATES = {"adapters": 0.01, "all": 0.002}


def fitting(loaded: Any, work: Path | None = None, **options: Any) -> Fitting:
    usual = {"kind": "distill", "tokens": 12 * 64, "sequence_length": 16}
    rate = {"learning_rate": RATES[options.get("train", "adapters")]}
    asked = HealOptions(**usual | rate | options)
    first = text()
    texts = HealingTexts(first, (first.ref,), (text(8, seed=1),), None)
    from exporter.progress import QUIET

    return Fitting(loaded, texts, DROPPED, asked, work, QUIET)


def answer(model: Any) -> Any:
    with torch.inference_mode():
        found = model(IDS)
        return (found.logits if hasattr(found, "logits") else found[0]).clone()


@pytest.mark.parametrize(
    ("family", "train"),
    [("llama", "adapters"), ("llama", "all"), ("gpt2", "adapters"), ("bert", "adapters")],
)
def test_held_out_loss_falls_and_the_model_is_as_it_was(family: str, train: Any) -> None:
    loaded = tiny_loaded(family)
    before, hooks = answer(loaded.model), hook_count(loaded.model)
    modules = [type(module) for module in loaded.model.modules()]
    with distilled(fitting(loaded, train=train)) as made:
        assert made.training is not None
        losses = [check.held_out_loss for check in made.training.checks]
        assert min(losses) < 0.95 * losses[0]
        assert made.weights
        assert not any(each.maps or each.bias is not None
                       for each in made.branch_replacements.values())  # fmt: skip
    assert torch.equal(answer(loaded.model), before)
    assert hook_count(loaded.model) == hooks
    assert [type(module) for module in loaded.model.modules()] == modules
    assert not any(each.requires_grad for each in loaded.model.parameters())


@pytest.mark.parametrize(
    ("family", "train"),
    [
        *(("llama", "adapters"), ("llama", "all"), ("gpt2", "adapters"), ("bert", "all")),
        *(("gpt_neox", "adapters"), ("mixtral", "adapters")),
    ],
)
def test_written_weights_give_the_student(family: str, train: Any, tmp_path: Path) -> None:
    """What the student answered is what the model answers with the plan's weights and the cut."""
    loaded = tiny_loaded(family)
    cut = dict.fromkeys(DROPPED, NOTHING)
    with distilled(fitting(loaded, train=train)) as made:
        assert made.within is not None
        with made.within(), branches_replaced(loaded.model, cut):
            wanted = answer(loaded.model)
        plan = PruningPlan(deletions=planned(("attention", 1, "none"), ("mlp", 2, "none")))
        written = write_healed_plan(tmp_path / "plan.json", plan, {}, weights=made.weights)
    assert written.changed_weights == len(made.weights)
    read = LoadedPlan.read(tmp_path / "plan.json")
    with branches_replaced(loaded.model, cut):
        bare = answer(loaded.model)
    change_weights(loaded.model, read.changed_weights)
    with branches_replaced(loaded.model, cut):
        found = answer(loaded.model)
    assert torch.allclose(found, wanted, atol=2e-5)
    assert not torch.allclose(found, bare, atol=1e-3)
