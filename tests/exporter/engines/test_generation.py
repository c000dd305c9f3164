"""Generation with a cache gives what recomputing everything for each token gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.engines.decoding.generate import generate
from exporter.engines.decoding.runner_decoder import OnnxRuntimeDecoder
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import BackendError, ComparisonError
from graph_passes import Deletion, prune_graph, save_model
from tests.raising import raises
from tests.stand_in.decoders import Scripted
from tests.tiny_graphs import HEAD_DIM, HEADS, TinySpec, tiny_model

PROMPT = [3, 1, 4, 1, 5]
COUNTING = range(1, 9)


def saved(folder: Path, *cuts: Deletion, renumber: bool = False) -> Path:
    model = tiny_model(TinySpec(layers=3))
    if cuts:
        model, _ = prune_graph(model, cuts, renumber_kv=renumber)
    save_model(model, folder / "model.onnx")
    return folder / "model.onnx"


def recomputed(path: Path, count: int) -> list[int]:
    ids = list(PROMPT)
    with OnnxRuntimeRunner(path, threads=1) as runner:
        for _ in range(count):
            feed: dict[str, Any] = {
                spec.name: np.zeros((1, HEADS, 0, HEAD_DIM), np.float32) for spec in runner.inputs
            }
            feed["input_ids"] = np.array([ids])
            feed["attention_mask"] = np.ones((1, len(ids)), np.int64)
            logits = runner.run(feed, ["logits"])["logits"]
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("renumber", [False, True])
def test_the_cache_changes_nothing(cut: bool, renumber: bool, tmp_path: Path) -> None:
    cuts = [Deletion(1, "attention")] if cut else []
    path = saved(tmp_path, *cuts, renumber=renumber)
    with OnnxRuntimeDecoder(path, threads=1) as decoder:
        done = generate(decoder, PROMPT, new_tokens=8)
        again = generate(decoder, PROMPT, new_tokens=8)
    assert list(done.token_ids) == recomputed(path, 8)
    assert again.token_ids == done.token_ids
    assert not done.ended


def test_it_ends_where_the_model_does() -> None:
    done = generate(Scripted(COUNTING), [0], new_tokens=8, stop_ids=frozenset({4}))
    assert (done.token_ids, done.ended) == ((1, 2, 3), True)


def test_it_ends_where_enough_is_there() -> None:
    decoder = Scripted(COUNTING)
    done = generate(decoder, [0], new_tokens=2, stop_ids=frozenset({4}))
    assert (done.token_ids, done.ended) == ((1, 2), False)
    assert decoder.at == 2  # no step more than was asked for


def test_an_empty_prompt_and_logits_that_are_no_numbers_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with raises(BackendError, "no-tokens"):
        generate(Scripted(COUNTING), [], new_tokens=1)
    monkeypatch.setattr(Scripted, "step", lambda *_: np.array([[0.0, np.nan]]))
    with raises(BackendError, "not-finite"):
        generate(Scripted(COUNTING), [0], new_tokens=1)


def test_a_graph_without_a_cache_cannot_generate(tmp_path: Path) -> None:
    save_model(tiny_model(TinySpec(cache=False)), tmp_path / "model.onnx")
    with raises(BackendError, "no-kv-cache"):
        OnnxRuntimeDecoder(tmp_path / "model.onnx", threads=1).__enter__()


def texts(folder: Path, **configs: Any) -> TextModel:
    """What a folder with these configs says."""
    saved(folder)
    (folder / "tokenizer.json").write_text("{}")
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    return TextModel.of(folder)


def test_the_generation_config_knows_what_ends_a_text(tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    both = texts(
        tmp_path / "both", config={"eos_token_id": 1}, generation_config={"eos_token_id": [1, 9]}
    )
    assert both.stop_ids == {1, 9}
    (tmp_path / "one").mkdir()
    one = texts(tmp_path / "one", config={"eos_token_id": 1}, generation_config={})
    assert one.stop_ids == {1}


def test_a_file_that_is_no_tokenizer_is_told(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with raises(ComparisonError, "broken-tokenizer"):
        texts(tmp_path).encode("hi")
