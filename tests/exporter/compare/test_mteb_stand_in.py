"""mteb's tasks by name, with a stand-in for the library, and without it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporter.cli import run
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
    one_logit,
    task_of,
)
from tests.raising import raises
from tests.text_graphs import WORDS, write_tiny_lm, write_tokenizer
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
    numbers = {word: number for number, word in enumerate(WORDS, 1)}
    assert runner.read[2] == [numbers["to"], *[numbers["of"]] * 3]
    lengths = np.linalg.norm(tasks["R"].given, axis=1)
    assert lengths == pytest.approx([3**-0.5, 3**-0.5, (1 + 9) ** 0.5 / 4])


def test_a_reranker_is_a_cross_encoder(folder: ModelFolder, tasks: dict[str, Task]) -> None:
    tasks["R"] = Task("ndcg_at_10")
    _scores(one_logit("the"), folder, "R")
    assert tasks["R"].given.tolist() == pytest.approx([0.5, -1, -1])
    three = Encoder("logits", np.zeros((len(WORDS) + 1, 3)), pools=True)
    with raises(ComparisonError, "no-reranker", 3):
        _scores(three, folder, "R")


def test_mteb_s_own_failures_are_told(folder: ModelFolder, tasks: dict[str, Task]) -> None:
    tasks["R"] = Task("ndcg_at_10", fails=OSError("unreachable"))
    with raises(TaskError, "mteb-failed", "unreachable"):
        _scores(embedder(), folder, "R")


def test_a_model_that_embeds_nothing(folder: ModelFolder, tasks: dict[str, Task]) -> None:
    tasks["R"] = Task("ndcg_at_10")
    with raises(ComparisonError, "no-embeddings", "model.onnx"):
        _scores(Encoder("logits", np.eye(len(WORDS) + 1)), folder, "R")


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
    model = MtebEncoder(None, "m")  # type: ignore[arg-type]
    first, second = np.array([[2.0, 0], [1, 1]]), np.array([[0.0, 3], [5, 5]])
    assert model.similarity(first, second) == pytest.approx(
        np.array([[0, 0.5**0.5], [0.5**0.5, 1]])
    )
    assert model.similarity_pairwise(first, second) == pytest.approx([0, 1])


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    write_tokenizer(write_tiny_lm(tmp_path, output="last_hidden_state"))
    call = ["compare", str(tmp_path), str(tmp_path), "-o", str(tmp_path / "o"), "-q"]
    assert run([*call, "--tasks", "mteb:STSBenchmark"]) == 2
    assert "depthcut[mteb]" in capsys.readouterr().err
