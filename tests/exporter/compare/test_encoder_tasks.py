"""Tasks of encoders: what their files hold, and what one arm scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from exporter.compare.accuracy import measure_accuracy
from exporter.compare.arms import Comparison
from exporter.compare.evaluation import tokenize_passages
from exporter.compare.options import TaskOptions
from exporter.compare.tasks import encoding
from exporter.compare.tasks.choosing import local_tasks, score_tasks
from exporter.compare.tasks.encoding import EncoderTask, correlation_influences, f1_influences
from exporter.engines.tensors import TensorSpec
from exporter.errors import CalibrationError, ComparisonError, TaskError
from exporter.models.model_folder import ModelFolder, longest_sequence
from exporter.models.texts.sources import TextSource
from exporter.models.texts.tokenizer import tokenizer_in
from tests.raising import raises
from tests.text_graphs import WORDS, write_tokenizer
from tests.tiny_models import write_bert_tokenizer, write_sentence_files

PASSAGES = [{"id": name, "text": text} for name, text in (("a", "the value"), ("b", "list string"))]
RETRIEVAL = [*PASSAGES, {"query": "value", "relevant": ["a"]}]
CHOICES = {"query": "the", "choices": ["a", "b"], "gold": 0}
TWO_CLASSES = [{"text": "the value", "label": 0}, {"text": "of", "label": 1}]
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


def one_logit(yes: str) -> Any:
    table = np.full((len(WORDS) + 1, 1), -1.0)
    table[WORDS.index(yes) + 1] = 2
    return Encoder("logits", table, pools=True)


def numbers(*words: str) -> list[int]:
    return [WORDS.index(word) + 1 for word in words]


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


def pairs(key: str, *rows: tuple[str, str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(("sentence1", "sentence2", key), row, strict=True)) for row in rows]


BEST = 1 + 1 / np.log2(3)
RANKED = {"query": "value list", "passages": ["of in", "the a", "a of"], "relevant": [1]}
YES = [{"text": "the", "label": 1}, {"text": "of", "label": 0}, {"text": "of", "label": 1}]
SCORES: dict[str, tuple[Callable[[], Any], Any, list[Any], dict[str, Any]]] = {
    "hits by rank": (
        embedder, ...,
        [*({"id": str(n), "text": f"the {word}"} for n, word in enumerate(WORDS[1:13])),
         {"query": WORDS[1], "relevant": ["0"]}, {"query": WORDS[2], "relevant": ["1", "11"]},
         {"query": WORDS[3], "relevant": ["11"]}],
        {"ndcg@10": [1, 1 / BEST, 0], "recall@10": [1, 0.5, 0]},
    ),
    "pairs as people rank them": (
        embedder, ...,
        pairs("score", ("the a", "the a", 5.0), ("the a", "the of", 3.0), ("the a", "of in", 1.0),
              ("a to", "a to", 2.0)),
        {"spearman": float(stats.spearmanr([1, 0.5, 0, 1], [5, 3, 1, 2]).statistic)},
    ),
    "pairs by a logit": (
        partial(one_logit, "the"), ...,
        pairs("score", ("the", "the", 5.0), ("the", "of", 3.0), ("of", "in", 1.0)),
        {"spearman": 1.0},
    ),
    "no correlation of what is all the same": (
        partial(one_logit, "the"), ..., pairs("score", ("the", "the", 1.0), ("the", "the", 2.0)),
        {"spearman": [0, 0]},
    ),
    "passages of each query": (
        embedder, ...,
        [{"query": "the", "passages": ["of in", "the of", "the the"], "relevant": [2]},
         {"query": "the", "passages": ["of in", "the of", "the the"], "relevant": [1, 0]},
         {"query": "of", "passages": [*["in"] * 10, "of"], "relevant": [8]}],
        {"ndcg@10": [1, (1 / np.log2(3) + 1 / 2) / BEST, 1 / np.log2(11)],
         "mrr@10": [1, 1 / 2, 1 / 10]},
    ),
    "passages by a classifier": (partial(classifier, "the"), ..., [RANKED], {"mrr@10": [1]}),
    **{f"a yes of {labels}": (partial(one_logit, "the"), labels, lines, score)
       for labels in (None, {"0": "LABEL_0"}, {"0": "bad", "1": "good"})
       for lines, score in (([RANKED], {"mrr@10": [1]}), (YES, {"acc": [1, 1, 0]}))},
    "the name of a yes": (
        partial(one_logit, "the"), {"0": "toxic"},
        [{"text": "the", "label": "toxic"}, {"text": "of", "label": "toxic"}], {"acc": [1, 0]},
    ),
    "classes of pairs": (
        partial(classifier, "the"), ...,
        pairs("label", ("the", "the", "good"), ("of", "in", "bad")), {"acc": [1, 1]},
    ),
    "classes by name and number": (
        partial(classifier, "the"), ...,
        [{"text": "the the", "label": "good"}, {"text": "the of", "label": 1},
         {"text": "of", "label": "bad"}, {"text": "of in", "label": "good"}],
        {"acc": [1, 1, 1, 0], "f1": (0.8 + 2 / 3) / 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_each_task_is_scored_by_its_definition(folder: ModelFolder, name: str) -> None:
    """A number is what the items' scores are in the mean."""
    make, labels, lines, expected = SCORES[name]
    if labels is not ...:
        folder.config["id2label"] = labels
    result, runner = {}, make()
    for metric, values in scored(folder, runner, *lines).items():
        if metric in expected:
            is_mean = isinstance(expected[metric], float)
            result[metric] = float(np.mean(values)) if is_mean else values
    assert result == {metric: pytest.approx(values) for metric, values in expected.items()}
    if name in ("pairs by a logit", "classes of pairs"):
        assert {len(row) for row in runner.read} == {2}
    if name == "passages by a classifier":  # a query and its passage together
        assert runner.read[0] == numbers("value", "list", "of", "in")


def test_an_embedder_with_a_cache_begins_each_text_anew(folder: ModelFolder) -> None:
    runner = embedder()
    past = TensorSpec("past_key_values.0.key", np.dtype(np.float32), ("batch", 1, "past", 2))
    runner.inputs = (IDS, past)
    assert scored(folder, runner, *RETRIEVAL) == scored(folder, embedder(), *RETRIEVAL)
    assert runner.past == {0}


@pytest.mark.parametrize("prompts", [None, {"query": "of ", "document": "in "}])
def test_prompts_of_the_folder_stand_before_queries_and_passages(
    folder: ModelFolder, prompts: Any
) -> None:
    write_sentence_files(folder.home, prompts=prompts)
    runner = embedder()
    scored(folder, runner, *RETRIEVAL)
    firsts = [row[0] for row in runner.read]
    assert (firsts == numbers("in", "in", "of")) is (prompts is not None)


@pytest.mark.parametrize(("pooling", "hit"), [({}, False), ({"pooling_mode": "cls"}, True)])
def test_token_states_are_pooled_as_the_folder_says(
    folder: ModelFolder, pooling: dict[str, str], hit: bool
) -> None:
    texts = [{"id": "a", "text": "the value"}, {"id": "b", "text": "value of"}]
    write_sentence_files(folder.home, **({"pooling": pooling} if pooling else {}))
    result = scored(folder, embedder(), *texts, {"query": "value the", "relevant": ["b"]})
    assert (result["ndcg@10"] == [1]) is hit


@pytest.mark.parametrize(
    ("logits", "answers"), [("classes", 400), ("one", 200)], ids=["classifier", "reranker"]
)
def test_as_many_texts_judge_a_classifier_as_a_limit_near_to_1_takes(
    folder: ModelFolder, logits: str, answers: int
) -> None:
    runner = classifier("the") if logits == "classes" else one_logit("the")
    facts = SimpleNamespace(vocabulary=len(WORDS) + 1, inputs=())
    arm: Any = SimpleNamespace(runner=runner, folder=folder, facts=facts)
    comparison = Comparison({"baseline": arm, "candidate": arm})
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 6)) + f" {n}." for n in range(400)]
    pairs = tuple(zip(texts[::2], texts[1::2], strict=True)) if logits == "one" else ()
    source = TextSource("t", tuple(texts), "0" * 64, tuple((pair,) for pair in pairs * 2))
    accuracy = measure_accuracy(comparison, source).accuracy
    assert accuracy is not None
    assert accuracy.tokens == answers
    assert accuracy.intervals["top1_agreement"].ci95[0] > 0.98


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
    tokens = Encoder("logits", np.eye(len(WORDS) + 1))
    three = Encoder("logits", np.zeros((len(WORDS) + 1, 3)), pools=True)
    for runner, lines, told in (
        (classifier("the"), RETRIEVAL, ("task-for-another-model", "model.onnx")),
        (tokens, RETRIEVAL, ("task-for-another-model", "model.onnx")),
        (embedder(), [CHOICES], ("task-for-another-model", "model.onnx")),
        (tokens, TWO_CLASSES, ("task-for-another-model", "model.onnx")),
        (
            three,
            pairs("score", ("the", "the", 5.0), ("the", "of", 3.0)),
            ("task-for-another-model", 3),
        ),
    ):
        with raises(ComparisonError, *told):
            scored(folder, runner, *lines)
    bare = ModelFolder(folder.onnx, None, {})
    with raises(TaskError, "no-tokenizer", "tokenizer.json"):
        score_tasks(task_of(folder.home, *RETRIEVAL), embedder(), bare)


def test_a_tokenizer_that_can_t_cut_pairs_is_none_s_trouble_without_pairs(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tokenizer_in(folder.home / "tokenizer.json")
    of_gguf = replace(own, encode_pair=None)
    monkeypatch.setattr(encoding, "tokenizer_in", lambda _: of_gguf)
    with raises(CalibrationError, "no-pairs", "tokenizer.json"):
        scored(folder, classifier("the"), *pairs("label", ("the", "of", 0)))
    assert scored(folder, embedder(), *RETRIEVAL)["recall@10"] == [1]
    tokens = Encoder("logits", np.eye(len(WORDS) + 1))
    for lines, code in (
        (RETRIEVAL, "task-for-another-model"),
        (TWO_CLASSES, "task-for-another-model"),
    ):
        with raises(ComparisonError, code, "model.onnx"):
            scored(folder, tokens, *lines)


BAD_LINES: list[Any] = [
    ([{"sentence1": "the", "score": 1}], "line 1"),
    ([{"sentence1": "the", "sentence2": " ", "score": 1}], "sentence2"),
    ([{"sentence1": "a", "sentence2": "b", "score": "high"}], "'high'"),
    ([{"sentence1": "a", "sentence2": "b", "score": float("nan")}], "nan"),
    ([{"sentence1": "a", "sentence2": "b", "score": 1}] * 2, "mine.jsonl"),
    (PASSAGES, "mine.jsonl"),
    ([*PASSAGES, {"query": "a", "relevant": ["c"]}], "'c'"),
    ([*PASSAGES, {"query": "a", "relevant": []}], "line 3"),
    ([*PASSAGES, {"query": "a"}], "line 3"),
    ([*PASSAGES, {"query": "", "relevant": ["a"]}], '"query"'),
    ([*PASSAGES, {"id": "c"}], '"text"'),
    ([*PASSAGES, {"id": "a", "text": "of"}], "'a'"),
    ([{"query": "a", "passages": ["b"], "relevant": [0]}], "passages"),
    ([{"query": "a", "passages": ["b", "c"], "relevant": [2]}], "2"),
    ([{"query": "a", "passages": ["b", "c"], "relevant": []}], "line 1"),
    ([{"query": "a", "passages": ["b", "c"], "relevant": [True]}], "True"),
    ([{"sentence1": "the", "label": 1}], "line 1"),
    ([{"text": "a", "label": 1}, {"text": "b"}], "line 2"),
    ([{"text": "a", "label": 1}, {"text": "b", "label": True}], "True"),
    ([{"text": "a", "label": 1}, {"text": "", "label": 1}], "line 2"),
]


@pytest.mark.parametrize(("lines", "field"), BAD_LINES)
def test_a_broken_line_names_itself(tmp_path: Path, lines: Any, field: str) -> None:
    with raises(TaskError, "broken-task-file", field):
        local_tasks(task_of(tmp_path, *lines))


def test_a_limit_is_one_of_queries_and_not_of_passages(tmp_path: Path) -> None:
    queries = [{"query": word, "relevant": ["a"]} for word in WORDS[:3]]
    [task] = local_tasks(task_of(tmp_path, *queries, *PASSAGES, limit=2)) or []
    assert isinstance(task, EncoderTask)
    assert (len(task.corpus), len(task.items)) == (2, 2)


def macro(said: Any, right: Any) -> float:
    hits = [2 * ((said == c) & (right == c)).sum() for c in (0, 1)]
    sizes = [(said == c).sum() + (right == c).sum() for c in (0, 1)]
    return float(np.mean(np.divide(hits, sizes)))


def spearman(first: Any, second: Any) -> float:
    return float(stats.spearmanr(first, second).statistic)


RNG = np.random.default_rng(0)
NUMBERS, RIGHT = RNG.normal(size=300), RNG.integers(0, 2, 300)


@pytest.mark.parametrize(
    ("influences", "plain", "first", "second"),
    [
        (correlation_influences, spearman, NUMBERS, NUMBERS + RNG.normal(size=300)),
        (f1_influences, macro, np.where(RNG.random(300) < 0.2, 1 - RIGHT, RIGHT), RIGHT),
    ],
)
def test_influences_have_the_spread_of_what_they_are_of(
    influences: Any, plain: Any, first: Any, second: Any
) -> None:
    floats = influences(first, second)
    assert floats.mean() == pytest.approx(plain(first, second))
    rows = np.random.default_rng(1).integers(0, 300, (400, 300))
    drawn = [plain(first[drawn], second[drawn]) for drawn in rows]
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
