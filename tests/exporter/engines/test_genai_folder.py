"""onnxruntime-genai runs decoders that its own builder did not write, by a config of ours."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.cut.surgery import prune_file
from exporter.engines.decoding.generate import generate
from exporter.engines.decoding.open_decoder import open_decoder
from exporter.engines.runners.cache_form import CacheForm, read_cache_form
from exporter.export.forms.genai import genai_config, genai_failure, write_genai_config
from graph_passes import save_model
from graph_passes.fusing.logits_to_keep import LogitsToKeepPass
from tests.graph_passes.fused_graphs import HEAD_DIM, HEADS, HIDDEN, VOCABULARY, FusedSpec
from tests.graph_passes.fused_graphs import fused_model as fused

PROMPT, NEW = [3, 1, 4, 1], 5
PASTS = [f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]


def model(**changes: Any) -> Any:
    """What is asked of a PyTorch model."""
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "vocab_size": VOCABULARY}
    config = SimpleNamespace(**{**sizes, "bos_token_id": 1, **changes})
    config.get_text_config = lambda: config
    return SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=[10, 9]))


@pytest.mark.genai
@pytest.mark.parametrize("cut", [False, True])
def test_the_runtime_generates_what_depthcut_does(tmp_path: Path, cut: bool) -> None:
    import onnxruntime_genai as runtime

    from exporter.artifacts import PlannedDeletion

    graph = fused(FusedSpec(layers=3))
    LogitsToKeepPass()(graph)
    folder = tmp_path / "whole"
    folder.mkdir()
    save_model(graph, folder / "model.onnx")
    loaded: Any = SimpleNamespace(model=model(max_position_embeddings=32))
    assert write_genai_config(loaded, folder)
    if cut:
        plan = [PlannedDeletion(kind="attention", layer=1)]
        prune_file(folder / "model.onnx", tmp_path / "cut" / "model.onnx", plan)
        folder = tmp_path / "cut"
    parameters = runtime.GeneratorParams(whole := runtime.Model(str(folder)))
    length = len(PROMPT) + NEW
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = runtime.Generator(whole, parameters)
    generator.append_tokens(PROMPT)
    while not generator.is_done():
        generator.generate_next_token()
    wanted = [int(token) for token in generator.get_sequence(0)][len(PROMPT) :]
    with open_decoder(folder, threads=1) as decoder:
        result = [*generate(decoder, PROMPT, new_tokens=NEW).token_ids]
    assert result[: len(wanted)] == wanted
    assert wanted


@pytest.mark.genai
@pytest.mark.parametrize(("changes", "runs"), [({}, True), ({"head_size": 8}, False)])
def test_the_runtime_is_asked_whether_it_runs_a_folder(
    tmp_path: Path, changes: dict[str, int], runs: bool
) -> None:
    save_model(fused(FusedSpec(layers=2)), tmp_path / "model.onnx")
    loaded: Any = SimpleNamespace(model=model(max_position_embeddings=16))
    assert write_genai_config(loaded, tmp_path)
    path = tmp_path / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"].update(changes)
    path.write_text(json.dumps(config))
    reason = genai_failure(tmp_path)
    assert (reason is None) is runs
    assert str(tmp_path) not in (reason or "")


def test_sizes_and_ids_are_told(tmp_path: Path) -> None:
    save_model(fused(FusedSpec()), tmp_path / "model.onnx")
    form, told_32 = read_cache_form(tmp_path / "model.onnx"), model(max_position_embeddings=32)
    outcome = genai_config(told_32, ["input_ids", "attention_mask", *PASTS], form)
    assert outcome is not None
    result, decoder = outcome["model"], outcome["model"]["decoder"]
    assert (decoder["head_size"], decoder["num_key_value_heads"]) == (HEAD_DIM, HEADS)
    assert decoder["num_hidden_layers"] == 2
    assert "position_ids" not in decoder["inputs"]
    assert (result["bos_token_id"], result["eos_token_id"], result["pad_token_id"]) == (
        1,
        [10, 9],
        10,
    )
    assert outcome["search"]["past_present_share_buffer"]
    assert result["context_length"] == 32


@pytest.mark.parametrize(
    ("heads", "positions"),
    [
        ([(2, 16), (2, 16)], None),
        ([(2, 16), (1, 16)], 32),
        ([(2, 16), (2, 8)], 32),
        ([(2, None), (2, None)], 32),
    ],
)
def test_what_the_runtime_can_t_be_told_gives_no_config(
    heads: list[tuple[int | None, int | None]], positions: int | None
) -> None:
    sizes = {name: heads[number // 2] for number, name in enumerate(PASTS)}
    changes = {} if positions is None else {"max_position_embeddings": positions}
    assert genai_config(model(**changes), PASTS, CacheForm(heads=sizes)) is None
    usual = CacheForm(heads=dict.fromkeys(PASTS, (2, 16)))
    result = genai_config(model(max_position_embeddings=32), PASTS, usual)
    assert result is not None
    assert not result["search"]["past_present_share_buffer"]
