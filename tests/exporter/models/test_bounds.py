"""Numbers of a stranger's: layers and digits that no model has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.cut.gguf_layers import place_in_layer
from exporter.errors import GgufFileError, UnsafeModelError
from exporter.models.graph_facts import CACHE_INPUT
from exporter.models.loading.checked_folder import refuse_endless
from exporter.models.loading.sources import resolve_source
from exporter.models.model_folder import ModelFolder
from exporter.models.texts.calibration import seed_of
from graph_passes.types import MOST_LAYERS, number_in
from tests.raising import raises
from tests.tiny_gguf import TinyGguf

LONG, ARABIC = "7" * 5_000, "1\N{ARABIC-INDIC DIGIT THREE}"


@pytest.mark.parametrize("digits", [LONG, ARABIC, "\N{SUPERSCRIPT TWO}", "-1", ""])
@pytest.mark.parametrize(
    ("read", "nothing"),
    [
        (number_in, {None}),
        (lambda digits: place_in_layer(f"blk.{digits}.attn_q.weight"), {None}),
        (lambda digits: CACHE_INPUT.fullmatch(f"past_key_values.{digits}.key"), {None}),
        (lambda digits: seed_of(f"self (seed {digits})"), {0, 1, int("7" * 18)}),
    ],
)
def test_numbers_in_names_have_few_digits_and_those_of_ascii(
    digits: str, read: Callable[[str], Any], nothing: set[Any]
) -> None:
    assert read(digits) in nothing


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers"])
def test_a_config_beside_a_graph_tells_of_no_more_layers_than_a_model_has(
    tmp_path: Path, key: str
) -> None:
    for number in (MOST_LAYERS, MOST_LAYERS + 1):
        (tmp_path / "config.json").write_text(json.dumps({"text_config": {key: number}}))
        if number > MOST_LAYERS:
            with raises(UnsafeModelError, "", tmp_path / "config.json", MOST_LAYERS):
                ModelFolder.beside(tmp_path / "model.onnx", tmp_path)
        else:
            ModelFolder.beside(tmp_path / "model.onnx", tmp_path)


def test_a_gguf_file_tells_of_no_more_layers_before_transformers_makes_them(tmp_path: Path) -> None:
    tiny = TinyGguf.llama()
    tiny.entries["llama.block_count"] = ("I", (1 << 32) - 1)
    tiny.write(tmp_path / "m.gguf")
    with raises(GgufFileError, "layer-count", tmp_path / "m.gguf", "block_count", MOST_LAYERS):
        resolve_source(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("key", "number", "is_endless"),
    [
        ("num_hidden_layers", 80, False),
        ("num_experts", 10_001, True),
        ("vocab_size_per_layer_input", 262_144, False),  # of Gemma 3n
        ("moe_shared_expert_intermediate_size", 24_576, False),
    ],
)
def test_sizes_are_no_counts_of_layers(
    tmp_path: Path, key: str, number: int, is_endless: bool
) -> None:
    if not is_endless:
        refuse_endless({key: number}, tmp_path)
        return
    with raises(UnsafeModelError, "", tmp_path, key):
        refuse_endless({key: number}, tmp_path)
