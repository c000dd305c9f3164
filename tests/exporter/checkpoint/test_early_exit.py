"""The first layers of an encoder alone, as a plain model that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import PruningPlan
from exporter.errors import PlanError
from tests.raising import raises
from tests.tiny_models import planned, random_replacements, write_encoder, write_sentence_files

pytestmark = pytest.mark.torch

EXIT = planned(("block", 2, "none"), ("block", 1, "none"))


def written(folder: Path, plan: Any, form: Any = "early-exit", **more: Any) -> Any:
    from exporter.checkpoint.write import write_checkpoint
    from exporter.models.loading.model_source import load_model

    source = folder / "model"
    if not source.exists():
        source.mkdir()
        write_encoder(source)
        write_sentence_files(source)
    loaded = load_model(str(source))
    return write_checkpoint(loaded, PruningPlan(deletions=plan), folder / "out", form=form, **more)


def test_transformers_loads_what_the_first_layers_give(tmp_path: Path) -> None:
    import torch
    import transformers

    facts = written(tmp_path, EXIT)
    assert (facts.kept, facts.plain) == ([0], True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1
    whole, cut = (
        transformers.AutoModel.from_pretrained(tmp_path / name) for name in ("model", "out")
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = whole(ids, output_hidden_states=True).hidden_states[1]
        assert torch.allclose(cut(ids).last_hidden_state, wanted, atol=1e-6)
    assert (tmp_path / "out" / "modules.json").is_file()
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()


def test_without_it_the_norms_stay_and_so_do_the_layers(tmp_path: Path) -> None:
    facts = written(tmp_path, EXIT, form="own")
    assert (facts.kept, facts.plain) == (None, False)


@pytest.mark.parametrize(
    "plan",
    [planned(("block", 1, "none")), planned(("attention", 2, "none")),
     planned(("block", 2, "none"), ("mlp", 1, "none"))],
)  # fmt: skip
def test_other_plans_are_no_early_exit(tmp_path: Path, plan: Any) -> None:
    with raises(PlanError, "no-early-exit", "--keep-first"):
        written(tmp_path, plan)
    assert not (tmp_path / "out").exists()


def test_a_plan_that_was_healed_with_the_norms(tmp_path: Path) -> None:
    numbers = random_replacements(32, EXIT)
    with raises(PlanError, "healed-elsewhere"):
        written(tmp_path, EXIT, replacements=numbers)
