"""Generation with a cache gives what recomputing everything for each token gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from exporter.engines.decoding.generate import Sampler, SamplingSettings, generate
from exporter.engines.decoding.runner_decoder import OnnxRuntimeDecoder
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import BackendError, ComparisonError, UsageError
from graph_passes import Deletion, prune_graph, save_model
from tests.raising import raises
from tests.tiny_graphs import HEAD_DIM, HEADS, TinySpec, tiny_model

PROMPT = [3, 1, 4, 1, 5]


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


class Scripted:
    """A decoder that wants to say 1, 2, 3 ..."""

    backend = "scripted"

    def __init__(self) -> None:
        self.at = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def refuse_unfit(self, batch: int, prompt: int, new_tokens: int) -> None:
        pass

    def prefill(self, token_ids: Any, *, context: int | None = None) -> Any:
        self.at = 0
        return self.step(token_ids)

    def step(self, token_ids: Any) -> Any:
        self.at += 1
        return np.eye(9, dtype=np.float32)[[self.at]]


def test_it_ends_where_the_model_does() -> None:
    done = generate(Scripted(), [5], new_tokens=8, stop_ids=frozenset({4}))
    assert (done.token_ids, done.ended) == ((1, 2, 3), True)


def test_it_ends_where_enough_is_there() -> None:
    decoder = Scripted()
    done = generate(decoder, [5], new_tokens=2, stop_ids=frozenset({4}))
    assert (done.token_ids, done.ended) == ((1, 2), False)
    assert decoder.at == 2  # no step more than was asked for


def test_an_empty_prompt_is_refused() -> None:
    with raises(BackendError, "no-tokens"):
        generate(Scripted(), [], new_tokens=1)


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


LOGITS = np.log(np.array([[0.1, 0.2, 0.4, 0.3]]))


def drawn(**how: Any) -> list[int]:
    sampler = Sampler(SamplingSettings(**how))
    return [int(sampler.choose(LOGITS)[0]) for _ in range(4000)]


def test_draws_follow_the_distribution() -> None:
    shares = np.bincount(drawn(temperature=1.0), minlength=4) / 4000
    assert np.abs(shares - [0.1, 0.2, 0.4, 0.3]).max() < 0.03


def test_the_same_seed_gives_the_same_draws() -> None:
    assert drawn(temperature=1.0, seed=7) == drawn(temperature=1.0, seed=7)
    assert drawn(temperature=1.0, seed=7) != drawn(temperature=1.0, seed=8)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"temperature": 0.0}, {2}),
        ({"temperature": 1.0, "top_k": 2}, {2, 3}),
        ({"temperature": 1.0, "top_p": 0.69}, {2, 3}),
        ({"temperature": 1.0, "top_p": 0.75}, {1, 2, 3}),
        ({"temperature": 1.0, "top_p": 0.01}, {2}),
        ({"temperature": 1.0}, {0, 1, 2, 3}),
        ({"temperature": 1e-320}, {2}),
    ],
)
def test_only_likely_tokens_are_drawn(how: dict[str, Any], kept: set[int]) -> None:
    assert set(drawn(**how)) == kept


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": -1},
        {"temperature": np.nan},
        {"temperature": np.inf},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.5},
    ],
)
def test_settings_that_make_no_sense_are_refused(how: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SamplingSettings(**how)


def test_nan_logits_are_told() -> None:
    with raises(BackendError, "not-finite"):
        Sampler(SamplingSettings()).choose(np.array([[0.0, np.nan]]))
