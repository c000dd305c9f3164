"""Tasks of encoders: what their files hold, and what one arm scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from exporter.compare.accuracy import measure_accuracy
from exporter.compare.evaluation import tokenize_passages
from exporter.compare.options import CompareOptions, TaskOptions
from exporter.compare.tasks import encoding
from exporter.compare.tasks.choosing import local_tasks, only_for_encoders, score_tasks
from exporter.compare.tasks.encoding import (
    EncoderTask,
    Retrieval,
    correlation_influences,
    f1_influences,
)
from exporter.engines.tensors import TensorSpec
from exporter.errors import CalibrationError, ComparisonError, TaskError
from exporter.models.model_folder import ModelFolder, longest_sequence
from exporter.models.texts.sources import TextSource
from exporter.models.texts.tokenizer import tokenizer_in
from exporter.progress import QUIET
from tests.raising import raises
from tests.text_graphs import WORDS, write_tokenizer
from tests.tiny_models import write_bert_tokenizer, write_sentence_files

PASSAGES = [{"id": name, "text": text} for name, text in (("a", "the value"), ("b", "list string"))]
IDS = TensorSpec("input_ids", np.dtype(np.int64), ("batch", "sequence"))


class Encoder:
    """Looks its answers up by token: each word is a direction of its own."""

    backend = "table"

    def __init__(self, output: str, table: np.ndarray[Any, Any], *, pools: bool = False) -> None:
        self._table, self._pools = table, pools
        self.inputs = (IDS,)
        shape = ("batch", table.shape[1]) if pools else ("batch", "sequence", table.shape[1])
        self.outputs = (TensorSpec(output, np.dtype(np.float32), shape),)
        self.read: list[list[int]] = []
        self.past: set[int] = set()

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str], **_: Any) -> dict[str, Any]:
        ids = inputs["input_ids"]
        self.read += ids.tolist()
        self.past |= {inputs[name].shape[2] for name in inputs if name.startswith("past")}
        states = self._table[ids].astype(np.float32)
        return {outputs[0]: states.mean(1) if self._pools else states}


def embedder() -> Any:
    return Encoder("last_hidden_state", np.eye(len(WORDS) + 1))


def classifier(*right: str) -> Any:
    """Says class 1 where most words are these."""
    table = np.tile([0.5, 0.0], (len(WORDS) + 1, 1))
    for word in right:
        table[WORDS.index(word) + 1] = [0.0, 1.0]
    return Encoder("logits", table, pools=True)


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    pytest.importorskip("tokenizers")
    write_tokenizer(tmp_path)
    config = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    return ModelFolder(tmp_path / "model.onnx", tmp_path / "tokenizer.json", config)


def task_of(folder: Path, *lines: Any, limit: int | None = None) -> TaskOptions:
    (folder / "mine.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return TaskOptions(tasks=("mine",), task_data=folder, task_limit=limit)


def scored(folder: ModelFolder, runner: Any, *lines: Any) -> dict[str, list[float]]:
    [result] = score_tasks(task_of(folder.home, *lines), runner, folder)
    return {name: values.tolist() for name, values in result.metrics.items()}


def test_retrieval_counts_a_hit_by_its_rank(folder: ModelFolder) -> None:
    corpus = [{"id": str(n), "text": f"the {word}"} for n, word in enumerate(WORDS[1:13])]
    queries = [
        {"query": WORDS[1], "relevant": ["0"]},
        {"query": WORDS[2], "relevant": ["1", "11"]},
        {"query": WORDS[3], "relevant": ["11"]},
    ]
    result = scored(folder, embedder(), *corpus, *queries)
    both = 1 + 1 / np.log2(3)
    assert result == {
        "ndcg@10": pytest.approx([1, 1 / both, 0]),
        "recall@10": pytest.approx([1, 0.5, 0]),
    }


def test_an_embedder_with_a_cache_begins_each_text_anew(folder: ModelFolder) -> None:
    lines = [*PASSAGES, {"query": "value", "relevant": ["a"]}]
    runner = embedder()
    past = TensorSpec("past_key_values.0.key", np.dtype(np.float32), ("batch", 1, "past", 2))
    runner.inputs = (IDS, past)
    assert scored(folder, runner, *lines) == scored(folder, embedder(), *lines)
    assert runner.past == {0}


def test_prompts_of_the_folder_stand_before_queries_and_passages(folder: ModelFolder) -> None:
    lines = [*PASSAGES, {"query": "value", "relevant": ["a"]}]
    for prompts in (None, {"query": "of ", "document": "in "}):
        write_sentence_files(folder.home, prompts=prompts)
        runner = embedder()
        scored(folder, runner, *lines)
        of, within = (WORDS.index(word) + 1 for word in ("of", "in"))
        firsts = [row[0] for row in runner.read]
        assert (firsts == [within, within, of]) is (prompts is not None)


def test_token_states_are_pooled_as_the_folder_says(folder: ModelFolder) -> None:
    lines = [
        {"id": "a", "text": "the value"},
        {"id": "b", "text": "value of"},
        {"query": "value the", "relevant": ["b"]},
    ]
    write_sentence_files(folder.home)
    assert scored(folder, embedder(), *lines)["ndcg@10"] != [1]
    write_sentence_files(folder.home, pooling={"pooling_mode": "cls"})
    assert scored(folder, embedder(), *lines)["ndcg@10"] == [1]


def test_pairs_are_ranked_as_people_do(folder: ModelFolder) -> None:
    texts = [("the a", "the a"), ("the a", "the of"), ("the a", "of in"), ("a to", "a to")]
    scores = [5.0, 3.0, 1.0, 2.0]
    lines = [
        {"sentence1": first, "sentence2": second, "score": score}
        for (first, second), score in zip(texts, scores, strict=True)
    ]
    cosines = [1, 0.5, 0, 1]
    spearman = scored(folder, embedder(), *lines)["spearman"]
    assert np.mean(spearman) == pytest.approx(stats.spearmanr(cosines, scores).statistic)


def test_a_cross_encoder_scores_pairs_by_its_logit(folder: ModelFolder) -> None:
    pairs = [("the", "the", 5.0), ("the", "of", 3.0), ("of", "in", 1.0)]
    keys = ("sentence1", "sentence2", "score")
    lines = [dict(zip(keys, pair, strict=True)) for pair in pairs]
    runner = one_logit("the")
    assert np.mean(scored(folder, runner, *lines)["spearman"]) == pytest.approx(1)
    assert [len(row) for row in runner.read] == [2, 2, 2]
    three = Encoder("logits", np.zeros((len(WORDS) + 1, 3)), pools=True)
    with raises(ComparisonError, "no-reranker", 3):
        scored(folder, three, *lines)


def test_similarities_that_are_all_the_same_have_no_correlation(folder: ModelFolder) -> None:
    lines = [{"sentence1": "the", "sentence2": "the", "score": score} for score in (1.0, 2.0)]
    assert scored(folder, one_logit("the"), *lines)["spearman"] == [0, 0]


def test_passages_of_each_query_are_ranked(folder: ModelFolder) -> None:
    passages = ["of in", "the of", "the the"]
    lines = [
        {"query": "the", "passages": passages, "relevant": [2]},
        {"query": "the", "passages": passages, "relevant": [1, 0]},
        {"query": "of", "passages": [*["in"] * 10, "of"], "relevant": [8]},
    ]
    best = 1 + 1 / np.log2(3)
    expected = [1, (1 / np.log2(3) + 1 / 2) / best, 1 / np.log2(11)]
    result = scored(folder, embedder(), *lines)
    assert result["ndcg@10"] == pytest.approx(expected)
    assert result["mrr@10"] == pytest.approx([1, 1 / 2, 1 / 10])


def test_a_reranker_reads_a_query_and_its_passage_together(folder: ModelFolder) -> None:
    line = {"query": "value list", "passages": ["of in", "the a", "a of"], "relevant": [1]}
    runner = classifier("the")
    assert scored(folder, runner, line)["mrr@10"] == [1]
    numbers = [WORDS.index(word) + 1 for word in ("value", "list", "of", "in")]
    assert runner.read[0] == numbers


@pytest.mark.parametrize(
    ("logits", "answers"), [("classes", 400), ("one", 200)], ids=["classifier", "reranker"]
)
def test_as_many_texts_judge_a_classifier_as_a_limit_near_to_1_takes(
    folder: ModelFolder, logits: str, answers: int
) -> None:
    runner = classifier("the") if logits == "classes" else one_logit("the")
    arm = SimpleNamespace(runner=runner, folder=folder)
    pair: Any = SimpleNamespace(
        baseline=arm,
        candidate=arm,
        judged={"baseline": arm, "candidate": arm},
        held_against=[("baseline", "candidate")],
        options=CompareOptions(),
        progress=QUIET,
        vocabulary=lambda: len(WORDS) + 1,
        reads_images=False,
        grid=(),
        references=(),
    )
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 6)) + f" {n}." for n in range(400)]
    pairs = tuple(zip(texts[::2], texts[1::2], strict=True)) if logits == "one" else ()
    source = TextSource("t", tuple(texts), "0" * 64, tuple((pair,) for pair in pairs * 2))
    accuracy = measure_accuracy(pair, source).accuracy
    assert accuracy is not None
    assert accuracy.top1_interval is not None
    assert accuracy.tokens == answers
    assert accuracy.top1_interval.ci95[0] > 0.98


def one_logit(yes: str) -> Any:
    table = np.full((len(WORDS) + 1, 1), -1.0)
    table[WORDS.index(yes) + 1] = 2
    return Encoder("logits", table, pools=True)


@pytest.mark.parametrize("labels", [None, {"0": "LABEL_0"}, {"0": "bad", "1": "good"}])
def test_a_single_logit_is_that_of_a_yes(folder: ModelFolder, labels: Any) -> None:
    folder.config["id2label"] = labels
    line = {"query": "value list", "passages": ["of in", "the a", "a of"], "relevant": [1]}
    assert scored(folder, one_logit("the"), line)["mrr@10"] == [1]
    texts = [{"text": "the", "label": 1}, {"text": "of", "label": 0}, {"text": "of", "label": 1}]
    assert scored(folder, one_logit("the"), *texts)["acc"] == [1, 1, 0]


def test_the_name_of_a_single_logit_is_that_of_the_yes(folder: ModelFolder) -> None:
    folder.config["id2label"] = {"0": "toxic"}
    texts = [{"text": "the", "label": "toxic"}, {"text": "of", "label": "toxic"}]
    assert scored(folder, one_logit("the"), *texts)["acc"] == [1, 0]


def test_classes_of_pairs(folder: ModelFolder) -> None:
    pairs = [("the", "the", "good"), ("of", "in", "bad")]
    keys = ("sentence1", "sentence2", "label")
    lines = [dict(zip(keys, pair, strict=True)) for pair in pairs]
    runner = classifier("the")
    assert scored(folder, runner, *lines)["acc"] == [1, 1]
    assert [len(row) for row in runner.read] == [2, 2]


def test_classes_by_name_and_by_number(folder: ModelFolder) -> None:
    lines = [
        {"text": "the the", "label": "good"},
        {"text": "the of", "label": 1},
        {"text": "of", "label": "bad"},
        {"text": "of in", "label": "good"},
    ]
    result = scored(folder, classifier("the"), *lines)
    assert result["acc"] == [1, 1, 1, 0]
    assert np.mean(result["f1"]) == pytest.approx((0.8 + 2 / 3) / 2)


@pytest.mark.parametrize("label", ["fine", 2, -1])
def test_labels_that_the_head_doesn_t_have(folder: ModelFolder, label: Any) -> None:
    lines = [{"text": "the", "label": "good"}, {"text": "of", "label": label}]
    with raises(ComparisonError, "labels-mismatch", repr(label), "bad, good"):
        scored(folder, classifier("the"), *lines)
    lines[1]["label"] = 0
    assert scored(folder, classifier("the"), *lines)["acc"] == [1, 1]


def test_a_config_with_more_labels_than_the_head_has_classes(folder: ModelFolder) -> None:
    folder.config["id2label"]["2"] = "middling"
    with raises(ComparisonError, "labels-mismatch", "middling", 2):
        scored(folder, classifier("the"), {"text": "the", "label": "good"})


def test_a_model_that_can_t_do_the_task(folder: ModelFolder) -> None:
    retrieval = [*PASSAGES, {"query": "value", "relevant": ["a"]}]
    with raises(ComparisonError, "no-embeddings", "model.onnx"):
        scored(folder, classifier("the"), *retrieval)
    choices = {"query": "the", "choices": ["a", "b"], "gold": 0}
    with raises(ComparisonError, "no-logits", "model.onnx"):
        scored(folder, embedder(), choices)
    tokens = Encoder("logits", np.eye(len(WORDS) + 1))
    with raises(ComparisonError, "no-classes", "model.onnx"):
        scored(folder, tokens, {"text": "the value", "label": 0}, {"text": "of", "label": 1})
    bare = ModelFolder(folder.onnx, None, {})
    with raises(TaskError, "no-tokenizer", "tokenizer.json"):
        score_tasks(task_of(folder.home, *retrieval), embedder(), bare)


def test_a_tokenizer_that_can_t_cut_pairs_is_none_s_trouble_without_pairs(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tokenizer_in(folder.home / "tokenizer.json")
    of_gguf = replace(own, encode_pair=None)
    monkeypatch.setattr(encoding, "tokenizer_in", lambda _: of_gguf)
    pair = {"sentence1": "the", "sentence2": "of", "label": 0}
    with raises(CalibrationError, "no-pairs", "tokenizer.json"):
        scored(folder, classifier("the"), pair)
    retrieval = [*PASSAGES, {"query": "value", "relevant": ["a"]}]
    assert scored(folder, embedder(), *retrieval)["recall@10"] == [1]
    tokens = Encoder("logits", np.eye(len(WORDS) + 1))
    with raises(ComparisonError, "no-embeddings", "model.onnx"):
        scored(folder, tokens, *retrieval)
    with raises(ComparisonError, "no-classes", "model.onnx"):
        scored(folder, tokens, {"text": "the value", "label": 0}, {"text": "of", "label": 1})


BAD_LINES: list[Any] = [
    ([{"sentence1": "the", "score": 1}], "one-sided", "line 1"),
    ([{"sentence1": "the", "sentence2": " ", "score": 1}], "one-sided", "sentence2"),
    ([{"sentence1": "a", "sentence2": "b", "score": "high"}], "no-score", "'high'"),
    ([{"sentence1": "a", "sentence2": "b", "score": float("nan")}], "no-score", "nan"),
    ([{"sentence1": "a", "sentence2": "b", "score": 1}] * 2, "one-score", "mine.jsonl"),
    (PASSAGES, "no-items", "mine.jsonl"),
    ([*PASSAGES, {"query": "a", "relevant": ["c"]}], "passage-missing", "'c'"),
    ([*PASSAGES, {"query": "a", "relevant": []}], "passage-missing", "line 3"),
    ([*PASSAGES, {"query": "a"}], "passage-missing", "line 3"),
    ([*PASSAGES, {"query": "", "relevant": ["a"]}], "empty-text", '"query"'),
    ([*PASSAGES, {"id": "c"}], "empty-text", '"text"'),
    ([*PASSAGES, {"id": "a", "text": "of"}], "named-twice", "'a'"),
    ([{"query": "a", "passages": ["b"], "relevant": [0]}], "too-few-texts", "passages"),
    ([{"query": "a", "passages": ["b", "c"], "relevant": [2]}], "passage-missing", "2"),
    ([{"query": "a", "passages": ["b", "c"], "relevant": []}], "passage-missing", "line 1"),
    ([{"query": "a", "passages": ["b", "c"], "relevant": [True]}], "passage-missing", "True"),
    ([{"sentence1": "the", "label": 1}], "one-sided", "line 1"),
    ([{"text": "a", "label": 1}, {"text": "b"}], "no-label", "line 2"),
    ([{"text": "a", "label": 1}, {"text": "b", "label": True}], "no-label", "True"),
    ([{"text": "a", "label": 1}, {"text": "", "label": 1}], "empty-text", "line 2"),
]


@pytest.mark.parametrize(
    ("lines", "code", "field"),
    BAD_LINES,
)
def test_a_broken_line_names_itself(tmp_path: Path, lines: Any, code: str, field: str) -> None:
    with raises(TaskError, code, field):
        local_tasks(task_of(tmp_path, *lines))


def test_a_limit_is_one_of_queries_and_not_of_passages(tmp_path: Path) -> None:
    queries = [{"query": word, "relevant": ["a"]} for word in WORDS[:3]]
    [task] = local_tasks(task_of(tmp_path, *queries, *PASSAGES, limit=2)) or []
    assert isinstance(task, EncoderTask)
    assert isinstance(task.asked, Retrieval)
    assert (len(task.asked.corpus), len(task.items)) == (2, 2)


def test_which_tasks_take_no_logits(tmp_path: Path) -> None:
    assert only_for_encoders(task_of(tmp_path, {"text": "a", "label": 1}))
    choices = {"query": "the", "choices": ["a", "b"], "gold": 0}
    assert not only_for_encoders(task_of(tmp_path, choices))
    assert not only_for_encoders(TaskOptions(tasks=("arc_easy",)))


def test_a_correlation_s_influences_have_its_spread() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=300)
    second = first + rng.normal(size=300)
    floats = correlation_influences(first, second)
    assert floats.mean() == pytest.approx(stats.spearmanr(first, second).statistic)
    drawn = [
        stats.spearmanr(first[rows], second[rows]).statistic
        for rows in rng.integers(0, 300, (400, 300))
    ]
    assert floats.std() / 300**0.5 == pytest.approx(np.std(drawn), rel=0.15)


def test_the_influences_of_an_f1_have_its_spread() -> None:
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, 300)
    said = np.where(rng.random(300) < 0.2, 1 - right, right)

    def macro(said: Any, right: Any) -> float:
        hits = [2 * ((said == c) & (right == c)).sum() for c in (0, 1)]
        sizes = [(said == c).sum() + (right == c).sum() for c in (0, 1)]
        return float(np.mean(np.divide(hits, sizes)))

    floats = f1_influences(said, right)
    assert floats.mean() == pytest.approx(macro(said, right))
    drawn = [macro(said[rows], right[rows]) for rows in rng.integers(0, 300, (400, 300))]
    assert floats.std() / 300**0.5 == pytest.approx(np.std(drawn), rel=0.15)


def test_a_long_passage_keeps_what_the_tokenizer_puts_behind_it(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    write_bert_tokenizer(tmp_path)
    text = TextSource("t", (" ".join(WORDS[:10]), " ".join(WORDS[:2])), "0" * 64)
    file = tmp_path / "tokenizer.json"
    ids = tokenize_passages(text, file, most=2, longest=6).ids
    assert sorted(row.tolist() for row in ids) == [[21, 1, 2, 3, 4, 22], [21, 1, 2, 22]]


def test_roberta_has_fewer_positions_than_its_table() -> None:
    result = {"max_position_embeddings": 514, "pad_token_id": 1}
    assert longest_sequence({"model_type": "xlm-roberta"} | result) == 512
    assert longest_sequence({"model_type": "bert"} | result) == 514
