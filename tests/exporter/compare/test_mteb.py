"""mteb's tasks by name, with a stand-in for the library, and in mteb itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporter.compare.options import TaskOptions
from exporter.compare.tasks.choosing import (
    local_tasks,
    only_for_encoders,
    refuse_missing_tasks,
    score_tasks,
    task_versions,
)
from exporter.compare.tasks.mteb_tasks import MtebCrossEncoder, MtebEncoder, prompt_names
from exporter.errors import ComparisonError, TaskError
from exporter.models.model_folder import ModelFolder
from tests.exporter.compare.test_encoder_tasks import (
    Encoder,
    classifier,
    embedder,
    numbers,
    one_logit,
    pairs,
    scored,
    task_of,
)
from tests.raising import raises
from tests.text_graphs import WORDS, write_tokenizer
from tests.tiny_models import write_sentence_files


class Task:
    """Has the methods of mteb's tasks that see scores of single items."""

    def __init__(self, metric: str, *, sets: int = 1, fails: Exception | None = None) -> None:
        self.metadata = SimpleNamespace(name="Made", type="Retrieval", main_score=metric)
        self._sets, self._fails = sets, fails
        self.given: Any = None

    def task_specific_scores(self, scores: Any, *_: Any, **__: Any) -> dict[str, float]:
        return {}

    def _calculate_scores(self, scores: Any, right: Any) -> dict[str, float]:
        return {}

    def run(self, model: Any) -> Any:
        if self._fails:
            raise self._fails
        texts = [{"text": ["the value", "list of"]}, {"text": ["of of of of in"]}]
        if isinstance(model, MtebCrossEncoder):
            self.given = model.predict(texts, texts, task_metadata=self.metadata)
        else:
            self.given = model.encode(texts, task_metadata=self.metadata, prompt_type="query")
        queries = {"b": {"ndcg_cut_10": 1.0}, "a": {"ndcg_cut_10": 0.5}}
        pairs = {"similarity_scores": [0.1, 0.4, 0.3]}
        result = []
        for _ in range(self._sets):
            if self.metadata.main_score.startswith("ndcg"):
                self.task_specific_scores(queries, {}, {}, hf_split="test", hf_subset="default")
                result.append({"main_score": 0.75})
            else:
                self._calculate_scores(pairs, [1, 2, 3])
                result.append({"main_score": 0.5})
        return SimpleNamespace(task_results=[SimpleNamespace(scores={"test": result})])


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    pytest.importorskip("tokenizers")
    write_tokenizer(tmp_path)
    return ModelFolder(tmp_path / "model.onnx", tmp_path / "tokenizer.json", {})


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Task]:
    """What the stand-in knows, by name."""
    known: dict[str, Task] = {}
    library = ModuleType("mteb")

    def get_task(name: str) -> Task:
        if name not in known:
            raise KeyError(f"KeyError: '{name}' not found. Did you mean: 'Known'?")
        return known[name]

    def evaluate(model: Any, task: Task, *, cache: None, **_: Any) -> Any:
        return task.run(model)

    library.get_task = get_task  # type: ignore[attr-defined]
    library.evaluate = evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mteb", library)
    return known


def _scores(runner: Any, folder: ModelFolder, *names: str) -> Any:
    task_options = TaskOptions(tasks=tuple(f"mteb:{name}" for name in names))
    return score_tasks(task_options, runner, folder)


def test_the_items_are_queries_or_pairs_and_make_mteb_s_figure(
    folder: ModelFolder, tasks: dict[str, Task]
) -> None:
    tasks |= {"R": Task("ndcg_at_10"), "S": Task("cosine_spearman")}
    retrieved, alike = _scores(embedder(), folder, "R", "S")
    assert retrieved.task == "mteb:R"
    assert retrieved.metrics["ndcg@10"].tolist() == [0.5, 1.0]  # by the queries' names
    assert alike.metrics["cosine_spearman"].shape == (3,)
    assert alike.metrics["cosine_spearman"].mean() == pytest.approx(0.5)


@pytest.mark.parametrize("task", [Task("ndcg_at_10", sets=2), Task("accuracy"), Task("ndcg_at_3")])
def test_what_has_no_items_has_mteb_s_figures(
    folder: ModelFolder, tasks: dict[str, Task], task: Task
) -> None:
    tasks["T"] = task
    [result] = _scores(embedder(), folder, "T")
    [values] = result.metrics.values()
    assert len(values) == (2 if task.metadata.main_score == "ndcg_at_10" else 1)


def test_texts_are_cut_where_the_folder_says_and_keep_their_length(
    folder: ModelFolder, tasks: dict[str, Task]
) -> None:
    tasks["R"] = Task("ndcg_at_10")
    write_sentence_files(folder.home, prompts={"query": "in ", "Made": "to "})
    (folder.home / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
    runner = embedder()
    _scores(runner, folder, "R")
    assert runner.read[2] == numbers("to", "of", "of", "of")
    lengths = np.linalg.norm(tasks["R"].given, axis=1)
    assert lengths == pytest.approx([3**-0.5, 3**-0.5, (1 + 9) ** 0.5 / 4])


def test_a_reranker_is_a_cross_encoder(folder: ModelFolder, tasks: dict[str, Task]) -> None:
    tasks["R"] = Task("ndcg_at_10")
    _scores(one_logit("the"), folder, "R")
    assert tasks["R"].given.tolist() == pytest.approx([0.5, -1, -1])


@pytest.mark.parametrize(
    ("runner", "fails", "told"),
    [
        (embedder(), OSError("unreachable"), (TaskError, "mteb-failed", "unreachable")),
        (Encoder("logits", np.eye(len(WORDS) + 1)), None,
         (ComparisonError, "no-embeddings", "model.onnx")),
        (Encoder("logits", np.zeros((len(WORDS) + 1, 3)), pools=True), None,
         (ComparisonError, "no-reranker", 3)),
    ],
)  # fmt: skip
def test_a_model_that_can_t_do_it_and_mteb_s_own_failures_are_told(
    folder: ModelFolder, tasks: dict[str, Task], runner: Any, fails: Any, told: Any
) -> None:
    tasks["R"] = Task("ndcg_at_10", fails=fails)
    with raises(*told):
        _scores(runner, folder, "R")


def test_names_are_looked_at_before_anything_is_measured(tasks: dict[str, Task]) -> None:
    tasks["Known"] = Task("ndcg_at_10")
    refuse_missing_tasks(TaskOptions(tasks=("mteb:Known",)))
    with raises(TaskError, "unknown-task", "'Knwn'", "'Known'"):
        refuse_missing_tasks(TaskOptions(tasks=("mteb:Knwn",)))
    with raises(TaskError, "whole-tasks", "--task-limit"):
        refuse_missing_tasks(TaskOptions(tasks=("mteb:Known",), task_limit=3))


def test_local_tasks_stand_beside_mteb_s(folder: ModelFolder, tasks: dict[str, Task]) -> None:
    tasks["R"] = Task("ndcg_at_10")
    local = task_of(folder.home, {"text": "the", "label": 1}, {"text": "of", "label": 0})
    both = TaskOptions(tasks=(*local.tasks, "mteb:R"), task_data=local.task_data)
    assert len(local_tasks(both) or []) == 1
    assert len(task_versions(both)) == 2
    scores = score_tasks(both, classifier("the"), folder)
    assert [score.task for score in scores] == ["mine", "mteb:R"]
    assert only_for_encoders(both)
    assert only_for_encoders(TaskOptions(tasks=("mteb:R",)))
    assert not only_for_encoders(TaskOptions(tasks=("mteb:R", "arc_easy")))


@pytest.mark.parametrize(
    ("prompt_type", "names"),
    [
        (None, ["STS12", "STS"]),
        ("query", ["STS12-query", "STS12", "STS-query", "STS", "query"]),
    ],
)
def test_the_most_special_prompt_is_taken(prompt_type: Any, names: Sequence[str]) -> None:
    assert prompt_names("STS12", "STS", prompt_type) == names
    assert prompt_names("N", "R", SimpleNamespace(value="document"))[-3:] == [
        "document", "passage", "corpus"
    ]  # fmt: skip


def test_similarities_are_cosines() -> None:
    model: Any = MtebEncoder(None, "m")  # type: ignore[arg-type]
    first, second = np.array([[2.0, 0], [1, 1]]), np.array([[0.0, 3], [5, 5]])
    every = np.array([[0, 0.5**0.5], [0.5**0.5, 1]])
    assert model.similarity(first, second) == pytest.approx(every)
    assert model.similarity_pairwise(first, second) == pytest.approx([0, 1])


# In mteb itself, on tasks whose data is made here. Tier ``mteb``.

_PAIRS = [("the a", "the a", 5), ("the a", "the of", 3), ("the a", "of in", 1), ("a to", "a of", 2)]
_QUERIES = {"q1": "value", "q2": "list of the", "q3": "type type string"}
_PASSAGES = {"a": "the value", "b": "list of", "c": "string", "d": "type list list list"}
_RIGHT = {"q1": {"a": 1}, "q2": {"b": 1}, "q3": {"d": 1}}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("mteb", reason="mteb brings sentence-transformers and polars")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def _given(monkeypatch: pytest.MonkeyPatch, task: Any) -> TaskOptions:
    """What names a task of this module."""
    monkeypatch.setattr("mteb.get_task", lambda name: task)
    return TaskOptions(tasks=(f"mteb:{task.metadata.name}",))


def _sts() -> Any:
    from datasets import Dataset, DatasetDict
    from mteb.mocks.mock_tasks.sts import MockSTSTask

    class Made(MockSTSTask):
        max_score = 5

        def load_data(self, *_: Any, **__: Any) -> None:
            self.dataset = DatasetDict({"test": Dataset.from_list(pairs("score", *_PAIRS))})
            self.data_loaded = True

    return Made()


def _retrieval(kind: str) -> Any:
    from datasets import Dataset
    from mteb.mocks.mock_tasks import reranking, retrieval

    base: Any = {"Retrieval": retrieval.MockRetrievalTask, "Reranking": reranking.MockRerankingTask}
    result = base[kind].metadata.model_copy(update={"eval_splits": ["test"]})

    class Made(base[kind]):  # type: ignore[misc]
        metadata = result

        def load_data(self, *_: Any, **__: Any) -> None:
            queries = [{"id": name, "text": text} for name, text in _QUERIES.items()]
            corpus = [{"id": n, "text": text, "title": ""} for n, text in _PASSAGES.items()]
            ranked = {name: list(_PASSAGES) for name in _QUERIES}
            self.dataset = {
                "default": {
                    "test": {
                        "queries": Dataset.from_list(queries),
                        "corpus": Dataset.from_list(corpus),
                        "relevant_docs": dict(_RIGHT),
                        "top_ranked": None if kind == "Retrieval" else ranked,
                    }
                }
            }
            self.data_loaded = True

    return Made()


@pytest.mark.mteb
@pytest.mark.usefixtures("offline")
def test_mteb_s_correlation_is_our_own(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    [result] = score_tasks(_given(monkeypatch, _sts()), embedder(), folder)
    lines = pairs("score", *_PAIRS)
    [values] = result.metrics.values()
    assert list(result.metrics) == ["cosine_spearman"]
    assert values.tolist() == pytest.approx(scored(folder, embedder(), *lines)["spearman"])


@pytest.mark.mteb
@pytest.mark.usefixtures("offline")
def test_mteb_s_retrieval_is_our_own_query_by_query(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    [result] = score_tasks(_given(monkeypatch, _retrieval("Retrieval")), embedder(), folder)
    lines = [
        *({"id": name, "text": text} for name, text in _PASSAGES.items()),
        *({"query": text, "relevant": [*_RIGHT[name]]} for name, text in _QUERIES.items()),
    ]
    own = scored(folder, embedder(), *lines)
    assert result.metrics["ndcg@10"].tolist() == pytest.approx(own["ndcg@10"])
    assert "3 items" in result.source


@pytest.mark.mteb
@pytest.mark.usefixtures("offline")
def test_a_reranker_orders_what_mteb_gives_it(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = one_logit("list")
    [result] = score_tasks(_given(monkeypatch, _retrieval("Reranking")), runner, folder)
    values = result.metrics["map@1000"]
    assert len(values) == 3
    assert values[2] == 1  # most of that word is in the passage that is right for q3
    assert numbers("value", "string") in runner.read  # both texts together


@pytest.mark.mteb
@pytest.mark.usefixtures("offline")
def test_of_other_tasks_there_is_the_figure_alone(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mteb.mocks.mock_tasks.classification import MockClassificationTask

    [result] = score_tasks(_given(monkeypatch, MockClassificationTask()), embedder(), folder)
    assert result.metrics["accuracy"].shape == (1,)
    assert 0 <= result.metrics["accuracy"][0] <= 1


@pytest.mark.mteb
@pytest.mark.usefixtures("offline")
def test_an_unknown_task_names_the_nearest(tmp_path: Path) -> None:
    with raises(TaskError, "unknown-task", "STSBenchmark"):
        refuse_missing_tasks(TaskOptions(tasks=("mteb:STSBenchmrk",)))
    refuse_missing_tasks(TaskOptions(tasks=("mteb:STSBenchmark",)))
    both = task_of(tmp_path, {"text": "the", "label": 1})
    refuse_missing_tasks(TaskOptions(tasks=(*both.tasks, "mteb:STS12"), task_data=both.task_data))
