"""The lines in a checkpoint's card load it, with gaps and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import PruningPlan
from tests.reading import lines_of, run_lines
from tests.text_graphs import write_llama_folder
from tests.tiny_models import planned

pytestmark = pytest.mark.torch

GAPS = planned(("attention", 0, "none"), ("mlp", 1, "none"))
BLOCK = planned(("block", 1, "none"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_llama_folder(tmp_path / "source")
    return tmp_path / "source"


def lines_for(source: Path, plan: Any) -> dict[str, str]:
    from exporter.checkpoint.model_card import CardSources, model_card
    from exporter.checkpoint.write import CARD, write_checkpoint
    from exporter.models.loading.model_source import load_model

    plan, folder = PruningPlan(deletions=plan), source.with_name("hf")
    loaded = load_model(str(source))
    write_checkpoint(loaded, plan, folder, card=lambda f: model_card(f, CardSources(plan)))
    return lines_of((folder / CARD).read_text(encoding="utf-8"))


def test_a_checkpoint_with_gaps_is_loaded_by_depthcut(source: Path) -> None:
    lines = lines_for(source, GAPS)
    assert list(lines) == ["depthcut"]
    _, result = run_lines(lines["depthcut"], source.with_name("hf"))
    assert len(result["tokens"]) > 5
    assert result["tuned"].model.training


def test_a_plain_checkpoint_is_loaded_by_transformers(source: Path) -> None:
    lines = lines_for(source, BLOCK)
    assert list(lines) == ["transformers"]
    _, result = run_lines(lines["transformers"], source.with_name("hf"))
    assert len(result["tokens"]) > 5
    assert result["model"].config.num_hidden_layers == 2


def test_an_encoder_s_files_of_sentence_transformers_go_with_it(source: Path) -> None:
    (source / "modules.json").write_text(
        '[{"path": "", "type": "sentence_transformers.models.Transformer"}]'
    )
    lines = lines_for(source, BLOCK)
    assert list(lines) == ["transformers", "sentence-transformers"]
    assert (source.with_name("hf") / "modules.json").is_file()
