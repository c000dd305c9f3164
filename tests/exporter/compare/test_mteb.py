"""Our runners in mteb itself, on tasks whose data is made here. Tier ``mteb``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter.compare.options import TaskOptions
from exporter.compare.tasks.choosing import refuse_missing_tasks, score_tasks
from exporter.errors import TaskError
from exporter.models.model_folder import ModelFolder
from tests.exporter.compare.test_encoder_tasks import embedder, one_logit, scored, task_of
from tests.raising import raises
from tests.text_graphs import WORDS, write_tokenizer

pytestmark = pytest.mark.mteb
mteb = pytest.importorskip("mteb", reason="mteb brings sentence-transformers and polars")

_PAIRS = [("the a", "the a", 5), ("the a", "the of", 3), ("the a", "of in", 1), ("a to", "a of", 2)]
_QUERIES = {"q1": "value", "q2": "list of the", "q3": "type type string"}
_PASSAGES = {"a": "the value", "b": "list of", "c": "string", "d": "type list list list"}
_RIGHT = {"q1": {"a": 1}, "q2": {"b": 1}, "q3": {"d": 1}}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    write_tokenizer(tmp_path)
    return ModelFolder(tmp_path / "model.onnx", tmp_path / "tokenizer.json", {})


def _given(monkeypatch: pytest.MonkeyPatch, task: Any) -> TaskOptions:
    """What names a task of this module."""
    monkeypatch.setattr(mteb, "get_task", lambda name: task)
    return TaskOptions(tasks=(f"mteb:{task.metadata.name}",))


def _sts() -> Any:
    from datasets import Dataset, DatasetDict
    from mteb.mocks.mock_tasks.sts import MockSTSTask

    class Made(MockSTSTask):
        max_score = 5

        def load_data(self, *_: Any, **__: Any) -> None:
            columns = dict(
                zip(("sentence1", "sentence2", "score"), zip(*_PAIRS, strict=True), strict=True)
            )
            rows = {name: list(values) for name, values in columns.items()}
            self.dataset = DatasetDict({"test": Dataset.from_dict(rows)})
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


def test_mteb_s_correlation_is_our_own(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    [result] = score_tasks(_given(monkeypatch, _sts()), embedder(), folder)
    lines = [{"sentence1": one, "sentence2": two, "score": item} for one, two, item in _PAIRS]
    [values] = result.metrics.values()
    assert list(result.metrics) == ["cosine_spearman"]
    assert values.tolist() == pytest.approx(scored(folder, embedder(), *lines)["spearman"])


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


def test_a_reranker_orders_what_mteb_gives_it(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = one_logit("list")
    [result] = score_tasks(_given(monkeypatch, _retrieval("Reranking")), runner, folder)
    values = result.metrics["map@1000"]
    assert len(values) == 3
    assert values[2] == 1  # most of that word is in the passage that is right for q3
    value, string = (WORDS.index(word) + 1 for word in ("value", "string"))
    assert [value, string] in runner.read  # both texts together


def test_of_other_tasks_there_is_the_figure_alone(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mteb.mocks.mock_tasks.classification import MockClassificationTask

    [result] = score_tasks(_given(monkeypatch, MockClassificationTask()), embedder(), folder)
    assert result.metrics["accuracy"].shape == (1,)
    assert 0 <= result.metrics["accuracy"][0] <= 1


def test_an_unknown_task_names_the_nearest(tmp_path: Path) -> None:
    with raises(TaskError, "unknown-task", "STSBenchmark"):
        refuse_missing_tasks(TaskOptions(tasks=("mteb:STSBenchmrk",)))
    refuse_missing_tasks(TaskOptions(tasks=("mteb:STSBenchmark",)))
    both = task_of(tmp_path, {"text": "the", "label": 1})
    refuse_missing_tasks(TaskOptions(tasks=(*both.tasks, "mteb:STS12"), task_data=both.task_data))
