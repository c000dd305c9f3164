"""Greedy continuations and embeddings of both arms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from exporter.artifacts import ComparisonReport
from exporter.cli import run
from exporter.compare.encoder_quality import compare_embeddings, embed, refuse_few_texts
from exporter.compare.options import CompareOptions, QualityOptions
from exporter.compare.session import compare
from exporter.compare.tasks.likelihood import task_texts
from exporter.engines.decoding.generate import agreement, continuations, generate
from exporter.engines.decoding.runner_decoder import OnnxRuntimeDecoder, RunnerDecoder
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import BackendError, ComparisonError, UsageError
from exporter.models.model_folder import ModelFolder
from graph_passes import save_model
from tests.raising import raises
from tests.reading import in_file
from tests.stand_in.decoders import Scripted
from tests.text_graphs import WORDS, write_tiny_lm, write_tokenizer
from tests.tiny_graphs import TinySpec, tiny_model

PROMPTS = np.array([[0, 5], [1, 5], [2, 5]])


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_texts_agree_up_to_the_first_other_token(batch_size: int | None) -> None:
    first = Scripted([1, 2, 3], [4, 5, 6], [7, 9, 1])
    second = Scripted([1, 2, 3], [4, 8, 6], [7, 9, 2])
    texts = (
        continuations(arm, PROMPTS, new_tokens=3, stop_ids={9}, batch_size=batch_size)
        for arm in (first, second)
    )
    result = agreement(*texts)
    assert result.exact_match == pytest.approx(2 / 3, abs=1e-12)  # after the 9 nothing counts
    assert (result.prompts, result.new_tokens) == (3, 3)
    assert first.batches == {None: [3], 1: [1, 1, 1], 2: [2, 1]}[batch_size]
    texts = (continuations(arm, PROMPTS, new_tokens=3) for arm in (first, second))
    assert agreement(*texts).exact_match == pytest.approx(1 / 3, abs=1e-12)


def test_a_runner_s_decoder_says_what_the_backend_s_own_says(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_model(tiny_model(TinySpec(layers=2)), path)
    with OnnxRuntimeDecoder(path, threads=1) as decoder:
        wanted = generate(decoder, [3, 1, 4], new_tokens=9).token_ids
    with OnnxRuntimeRunner(path, threads=1) as runner, RunnerDecoder(runner) as decoder:
        assert generate(decoder, [3, 1, 4], new_tokens=9).token_ids == wanted
        assert generate(decoder, [3, 1, 4], new_tokens=9).token_ids == wanted
    save_model(tiny_model(TinySpec(cache=False)), tmp_path / "encoder.onnx")
    with (
        OnnxRuntimeRunner(tmp_path / "encoder.onnx", threads=1) as runner,
        raises(BackendError, "no-kv-cache"),
    ):
        RunnerDecoder(runner).__enter__()


def language_models(folder: Path, config: dict[str, Any]) -> list[str]:
    for name, how in (("a", {}), ("b", {"layers": (1,), "noise": 1.0})):
        write_tiny_lm(folder / name, **how)
        write_tokenizer(folder / name)
        (folder / name / "config.json").write_text(json.dumps({"eos_token_id": 0} | config))
    return [str(folder / name) for name in "ab"]


@pytest.mark.usefixtures("no_timing")
def test_the_command_measures_what_it_is_asked_for(tmp_path: Path) -> None:
    arms = language_models(tmp_path, {"num_hidden_layers": 2})
    text = tmp_path / "text.txt"
    text.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 900)))
    call = ["compare", *arms, "-q", "--eval-tokens", "96", "--eval-text", str(text)]
    more = ["agreement_prompts: 1", "agreement_tokens: 5"]
    assert run([*call, "-o", str(tmp_path / "out"), *in_file(tmp_path, more)]) == 0
    accuracy = ComparisonReport.read(tmp_path / "out" / "report.json").accuracy
    assert accuracy is not None
    assert accuracy.generation is not None
    assert accuracy.generation.prompts == 1
    assert ComparisonReport.read(tmp_path / "out" / "report.json").arms.baseline.layers == 2
    silent = in_file(tmp_path, ["agreement_prompts: 0"])
    assert run([*call, "-o", str(tmp_path / "none"), *silent]) == 0
    accuracy = ComparisonReport.read(tmp_path / "none" / "report.json").accuracy
    assert accuracy is not None
    assert accuracy.generation is None


@pytest.mark.parametrize(("longest_cache", "generates"), [(126, False), (127, True)])
@pytest.mark.usefixtures("no_timing")
def test_generation_beyond_what_a_runner_holds_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest_cache: int, generates: bool
) -> None:
    def refuse(_: object, shapes: Mapping[str, tuple[int, ...]], **_phase: object) -> None:
        if shapes["attention_mask"][1] > longest_cache:
            raise BackendError("no profile holds this call")

    monkeypatch.setattr(OnnxRuntimeRunner, "refuse_shapes", refuse)
    arms = language_models(tmp_path, {})
    accuracy = compare(*map(Path, arms), CompareOptions(eval_tokens=96)).accuracy
    assert accuracy is not None
    assert (accuracy.generation is not None) == generates
    assert accuracy.top1_agreement is not None


@pytest.mark.parametrize("wrong", [{"agreement_prompts": -1}, {"agreement_tokens": 0}])
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        QualityOptions(**wrong)


def encoder(folder: Path, **how: Any) -> Path:
    return write_tiny_lm(folder, layers=(), output="last_hidden_state", **how)


@pytest.mark.usefixtures("no_timing")
def test_encoders_are_judged_by_their_embeddings(tmp_path: Path) -> None:
    first, second = encoder(tmp_path / "a"), encoder(tmp_path / "b", noise=0.5)
    write_tokenizer(first)
    accuracy = compare(first, second, CompareOptions(prefill_lengths=(4,))).accuracy
    assert accuracy is not None
    assert accuracy.text_source.startswith("pydoc (evaluation half")
    assert (accuracy.perplexity, accuracy.kl_divergence) == (None, None)
    embeddings = accuracy.embeddings
    assert embeddings is not None
    assert embeddings.texts == 64
    assert 0 < embeddings.lowest_cosine < embeddings.cosine < 1
    assert 0 < embeddings.rank_agreement < 1
    same = compare(first, first, CompareOptions(prefill_lengths=(4,))).accuracy
    assert same is not None
    assert same.embeddings is not None
    assert same.embeddings.lowest_cosine == pytest.approx(1, abs=1e-12)
    assert same.embeddings.rank_agreement == pytest.approx(1, abs=1e-12)


def test_embeddings_agree_with_a_plain_computation(tmp_path: Path) -> None:
    folders = [encoder(tmp_path / "a"), encoder(tmp_path / "b", noise=0.5)]
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 32, size) for size in (3, 9, 5, 7, 4)]
    with (
        OnnxRuntimeRunner(folders[0] / "model.onnx", threads=1) as first,
        OnnxRuntimeRunner(folders[1] / "model.onnx", threads=1) as second,
    ):
        result = compare_embeddings(*(embed(one, texts, arm="it") for one in (first, second)))
        arms = [
            np.array(
                [one.run({"input_ids": ids[None]})["last_hidden_state"][0].mean(0) for ids in texts]
            )
            for one in (first, second)
        ]
        with raises(ComparisonError, "too-few-texts", 2):
            refuse_few_texts(texts[:2])
    unit = [arm / np.linalg.norm(arm, axis=1, keepdims=True) for arm in arms]
    assert result.cosine == pytest.approx((unit[0] * unit[1]).sum(1).mean(), rel=1e-5)
    pairs = [[one[i] @ one[j] for i in range(5) for j in range(i)] for one in unit]
    assert result.rank_agreement == pytest.approx(stats.spearmanr(*pairs).statistic, rel=1e-9)
    assert result.rank_interval is not None
    assert result.rank_interval.value == result.rank_agreement


def test_the_interval_of_the_ranking_holds_that_of_other_texts_of_the_kind() -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((400, 8))
    second = first + 0.5 * rng.standard_normal(first.shape)
    unit = [item / np.linalg.norm(item, axis=1, keepdims=True) for item in (first, second)]
    wanted = compare_embeddings(*(item[:200] for item in unit)).rank_agreement
    held, widths = 0, []
    for start in range(200, 400, 20):
        rank_interval = compare_embeddings(
            *(item[start : start + 20] for item in unit)
        ).rank_interval
        assert rank_interval is not None
        held += rank_interval.ci95[0] <= wanted <= rank_interval.ci95[1]
        widths.append(rank_interval.ci95[1] - rank_interval.ci95[0])
    assert held >= 8
    assert max(widths) < 0.5


def test_embeddings_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    folders = [encoder(tmp_path / "a"), encoder(tmp_path / "b", scale=float("nan"))]
    texts = [np.array([1, 2])] * 3
    with (
        OnnxRuntimeRunner(folders[0] / "model.onnx", threads=1) as first,
        OnnxRuntimeRunner(folders[1] / "model.onnx", threads=1) as second,
    ):
        first_vectors = embed(first, texts, arm="baseline")
        assert np.isfinite(first_vectors).all()
        with raises(ComparisonError, "not-finite", "candidate", "text 0"):
            embed(second, texts, arm="candidate")
    with raises(ComparisonError, "other-width", 1):
        compare_embeddings(first_vectors, first_vectors[:, :1])


def test_the_codec_reads_the_folder_s_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    folder = ModelFolder(tmp_path / "model.onnx", tmp_path / "tokenizer.json", {"bos_token_id": 3})
    codec = task_texts(folder)
    assert (codec.prefix_id, codec.stop_ids) == (3, {7, 8})


class Compiled(OnnxRuntimeRunner):
    """As an arm of torch.compile says what it does."""

    def __init__(self, model: Path, **kind: Any) -> None:
        super().__init__(model, **kind)
        self.capabilities = replace(self.capabilities, shapes="compiled")


@pytest.mark.usefixtures("no_timing")
def test_what_would_be_compiled_for_each_length_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.engines.runners.onnxruntime.OnnxRuntimeRunner", Compiled)
    arms = [Path(arm) for arm in language_models(tmp_path, {})]
    accuracy = compare(*arms, CompareOptions(eval_tokens=96)).accuracy
    assert accuracy is not None
    assert accuracy.kl_divergence is not None
    assert accuracy.generation is None
    (tmp_path / "mine.jsonl").write_text('{"query": "a b", "choices": ["c", "d"], "gold": 0}')
    quality_options = QualityOptions(tasks=("mine",), task_data=tmp_path)
    wrong = CompareOptions(eval_tokens=96, quality=quality_options)
    with raises(ComparisonError, "recompiles") as caught:
        compare(*arms, wrong)
    assert "torch:DIR" in caught.value.hint
    encoders = encoder(tmp_path / "e"), encoder(tmp_path / "f")
    assert compare(*encoders, CompareOptions(prefill_lengths=(4,))).accuracy is None
