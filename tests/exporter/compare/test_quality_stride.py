"""Perplexity with a stride, against loops that predict one token at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from exporter.artifacts import ComparisonReport
from exporter.artifacts.latency import Shape
from exporter.cli import run
from exporter.compare.evaluation import random_ids, tokenize
from exporter.compare.options import CompareOptions, QualityOptions
from exporter.engines.inputs import make_inputs
from exporter.engines.runners.base import Array
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import ComparisonError, OptionError
from exporter.models.texts.sources import read_texts
from graph_passes import Deletion, prune_graph, save_model
from tests.exporter.judged_pairs import compare_pair
from tests.raising import raises
from tests.reading import in_file
from tests.text_graphs import write_tiny_lm, write_tokenizer
from tests.tiny_graphs import VOCABULARY, TinySpec, tiny_model

WIDTH, STRIDE = 12, 5


def test_each_token_is_predicted_once_from_as_much_as_its_sample_has(tmp_path: Path) -> None:
    model = tiny_model(TinySpec(layers=2))
    save_model(model, tmp_path / "a.onnx")
    save_model(prune_graph(model, [Deletion(0, "mlp")])[0], tmp_path / "b.onnx")
    found_ids = random_ids(VOCABULARY, sequence_length=WIDTH, tokens=48, stride=STRIDE)
    stream = [*found_ids.token_ids[0]]
    for sample in found_ids.token_ids[1:]:
        stream += [*sample[-STRIDE:]]
    with (
        OnnxRuntimeRunner(tmp_path / "a.onnx", threads=1) as first,
        OnnxRuntimeRunner(tmp_path / "b.onnx", threads=1) as second,
    ):
        accuracy = compare_pair(
            first, second, found_ids.token_ids, causal=True, overlap=found_ids.overlap
        )
        logs = [one_by_one(runner, stream) for runner in (first, second)]
    targets = np.array(stream[1:])[:, None]
    losses = [-np.take_along_axis(log, targets, axis=1).mean() for log in logs]
    assert accuracy.tokens == len(stream) - 1
    assert accuracy.perplexity is not None
    assert np.log(accuracy.perplexity.baseline) == pytest.approx(losses[0], rel=1e-5)
    assert np.log(accuracy.perplexity.candidate) == pytest.approx(losses[1], rel=1e-5)
    assert accuracy.log_perplexity_increase is not None
    assert accuracy.log_perplexity_increase.value == pytest.approx(losses[1] - losses[0], rel=1e-3)
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean()
    assert accuracy.kl_divergence == pytest.approx(kl, rel=1e-4)


def one_by_one(runner: Any, stream: list[int]) -> Array:
    """Log probabilities of each token but the first, each from a run of its own."""
    rows = []
    for target in range(1, len(stream)):
        begin = max(0, -(-(target - WIDTH + 1) // STRIDE) * STRIDE)
        ids = np.array([stream[begin:target]])
        inputs = make_inputs(runner.inputs, Shape("prefill", 1, ids.shape[1]), ids)
        rows.append(runner.run(inputs, ["logits"])["logits"][0, -1])
    array: Array = log_softmax(np.array(rows, np.float64), axis=-1)
    return array


def test_samples_overlap_and_keep_their_opening_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 20)]
    )
    tokenizer.save(str(path))
    texts = replace(read_texts("pydoc", part="evaluation"), documents=("the a and of " * 2,))
    tokens = tokenize(texts, path, sequence_length=5, tokens=8, separator_id=None, stride=2)
    assert tokens.token_ids.tolist() == [[20, 1, 2, 3, 4], [20, 3, 4, 1, 2], [20, 1, 2, 3, 4]]
    assert tokens.overlap == 3
    with raises(ComparisonError, "stride-too-long", 4, "--stride"):
        tokenize(texts, path, sequence_length=5, tokens=8, separator_id=None, stride=4)
    with raises(ComparisonError, "text-too-short", 10):
        tokenize(texts, path, sequence_length=10, tokens=40, separator_id=None, stride=4)


@pytest.mark.parametrize(("words", "tokens", "samples"), [(20_000, 800, 47), (90, 800, 1)])
def test_each_token_is_predicted_from_what_stands_before_it(
    words: int, tokens: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(text: str) -> list[int]:
        return [int(word) for word in text.split()]

    counting = SimpleNamespace(ends=([], []), plain=plain)
    monkeypatch.setattr("exporter.compare.evaluation.tokenizer_in", lambda _: counting)
    text = " ".join(map(str, range(words)))
    texts = replace(read_texts("pydoc", part="evaluation"), documents=(text,))
    path = Path("tokenizer.json")
    result = tokenize(texts, path, sequence_length=64, tokens=tokens, separator_id=None, stride=16)
    assert len(result.token_ids) == samples
    assert (np.diff(result.token_ids) == 1).all()
    scored = result.token_ids[1:, result.overlap :].ravel()
    assert len(set(scored.tolist())) == len(scored)
    if words > 1000:
        assert result.documents is not None
        assert len(result.documents) == samples


@pytest.mark.usefixtures("no_timing")
def test_the_command_takes_a_stride(tmp_path: Path) -> None:
    folder = write_tiny_lm(tmp_path / "a")
    write_tokenizer(folder)
    other = write_tiny_lm(tmp_path / "b", layers=(1,), noise=0.3)
    call = ["compare", str(folder), str(other), "-o", str(tmp_path / "out"), "-q"]
    assert run([*call, "--eval-tokens", "600", *in_file(tmp_path, ["stride: 64"])]) == 0
    accuracy = ComparisonReport.read(tmp_path / "out" / "report.json").accuracy
    assert accuracy is not None
    assert (accuracy.stride, accuracy.tokens) == (64, 511 + 64)
    assert accuracy.log_perplexity_increase is not None
    low, high = accuracy.log_perplexity_increase.ci95
    assert low < accuracy.log_perplexity_increase.value < high
    assert accuracy.kl_interval is not None
    assert accuracy.top5_agreement is not None
    assert 0 < accuracy.top5_agreement <= 1


@pytest.mark.parametrize("stride", [0, -1])
def test_a_stride_is_a_length(stride: int) -> None:
    with raises(OptionError, "", "--stride"):
        CompareOptions(quality=QualityOptions(stride=stride))
