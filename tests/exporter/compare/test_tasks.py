"""Tasks from local files: likelihoods with a shared cache, lm-eval's scores, paired statistics."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from exporter.artifacts import ComparisonReport, EvaluationReport
from exporter.artifacts.latency import Shape
from exporter.cli import run
from exporter.compare.options import TaskOptions
from exporter.compare.tasks import choosing as lm_eval_tasks
from exporter.compare.tasks.choosing import score_tasks
from exporter.compare.tasks.items import failing_as_task, read_task
from exporter.compare.tasks.likelihood import ContinuationRequest, LikelihoodScorer, task_texts
from exporter.engines.runners.base import Array
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.tensors import make_inputs
from exporter.errors import ComparisonError, TaskError, UsageError
from exporter.models.model_folder import ModelFolder, find_model
from exporter.progress import QUIET
from graph_passes import save_model
from tests.compared import encoder, language_model, language_models
from tests.present import present
from tests.raising import ends_in, raises
from tests.text_graphs import WORDS
from tests.tiny_graphs import VOCABULARY, TinySpec, tiny_model


class Counting:
    """A runner that counts the tokens that it runs."""

    def __init__(self, inner: OnnxRuntimeRunner) -> None:
        self.inner, self.tokens, self.rows = inner, 0, 0
        self.inputs, self.outputs = inner.inputs, inner.outputs

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], **_: Any
    ) -> dict[str, Array]:
        self.tokens += inputs["input_ids"].size
        self.rows = max(self.rows, len(inputs["input_ids"]))
        return self.inner.run(inputs, outputs)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnnxRuntimeRunner]:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    save_model(tiny_model(TinySpec(layers=2)), path)
    with OnnxRuntimeRunner(path, threads=1) as entered:
        yield entered


def requests(questions: int = 5, choices: int = 4) -> list[ContinuationRequest]:
    rng = np.random.default_rng(3)
    result = []
    for _ in range(questions):
        context = tuple(rng.integers(0, VOCABULARY, rng.integers(6, 20)).tolist())
        for _ in range(choices):
            answer = rng.integers(0, VOCABULARY, rng.integers(1, 6)).tolist()
            result.append(ContinuationRequest(context, tuple(answer)))
    return [result[at] for at in rng.permutation(len(result))]


def one_by_one(runner: Any, request: ContinuationRequest) -> tuple[float, bool]:
    ids = np.array([[*request.context, *request.continuation]])
    inputs = make_inputs(runner.inputs, Shape("prefill", 1, ids.shape[1]), ids)
    logits = runner.run(inputs, ["logits"])["logits"][0].astype(np.float64)
    rows = log_softmax(logits, axis=-1)[len(request.context) - 1 : -1]
    targets = np.array(request.continuation)
    return float(rows[range(len(targets)), targets].sum()), bool((rows.argmax(1) == targets).all())


def test_the_sample_s_probes_are_tasks_with_one_right_answer(tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "samples" / "07_ci" / "probes.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    for name in ("arithmetic", "brackets", "copy", "lookup"):
        task = read_task(tmp_path, name)
        assert len(task.items) == 100
        assert {item.gold for item in task.items} == {0, 1, 2, 3}
        assert all(len({answer for _, answer in item.pairs}) == 4 for item in task.items)
    for item in read_task(tmp_path, "arithmetic").items:
        text, answer = item.pairs[item.gold]
        assert sum(map(int, text.split("\n")[-1].rstrip(" =").split("+"))) == int(answer)


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_likelihoods_are_those_of_single_runs(
    runner: OnnxRuntimeRunner, shares: bool, batch_size: int
) -> None:
    wanted = [one_by_one(runner, request) for request in requests()]
    counting: Any = Counting(runner)
    scorer = LikelihoodScorer(counting, 64, VOCABULARY, batch_size=batch_size, shares=shares)
    result = scorer.score(requests())
    assert [item.log_likelihood for item in result] == pytest.approx(
        [sum_ for sum_, _ in wanted], abs=1e-5
    )
    assert [item.greedy for item in result] == [greedy for _, greedy in wanted]
    assert any(item.greedy for item in result) != all(item.greedy for item in result)
    assert counting.rows <= batch_size


def test_what_choices_share_runs_once(runner: OnnxRuntimeRunner) -> None:
    tokens = []
    for shares in (True, False):
        counting: Any = Counting(runner)
        LikelihoodScorer(counting, 64, VOCABULARY, shares=shares).score(requests())
        tokens.append(counting.tokens)
    assert tokens[0] < 0.6 * tokens[1]


def test_what_all_begin_with_runs_once_and_so_do_the_same_tokens(
    runner: OnnxRuntimeRunner,
) -> None:
    opening = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    result = [
        ContinuationRequest((*opening, question), (answer,))
        for question in (0, 1, 2)
        for answer in (5, 6, 7)
    ]
    result.append(ContinuationRequest(opening, (0, 9)))  # runs the tokens of the first question
    wanted = [one_by_one(runner, request)[0] for request in result]
    counting: Any = Counting(runner)
    outcome = LikelihoodScorer(counting, 64, VOCABULARY).score(result)
    assert [item.log_likelihood for item in outcome] == pytest.approx(wanted, abs=1e-5)
    assert counting.tokens <= 9 + 3 * 2
    assert LikelihoodScorer(counting, 64, VOCABULARY).score([]) == []


def test_too_long_requests_lose_their_start(runner: OnnxRuntimeRunner) -> None:
    long = ContinuationRequest(tuple([1, 2, 3, 4, 5] * 4), (6, 7))
    result = LikelihoodScorer(runner, 8, VOCABULARY).score([long])[0]
    want = one_by_one(runner, ContinuationRequest(long.context[-7:], long.continuation))
    assert result.log_likelihood == pytest.approx(want[0], abs=1e-5)


@pytest.mark.parametrize(
    ("context", "continuation", "longest", "told"),
    [
        ((1,) * 20, (6, 7), 1, ("context-too-long", 2, 1)),
        ((), (1,), 8, ("no-tokens",)),
        ((1,), (), 8, ("no-tokens",)),
        ((1,), (VOCABULARY,), 8, ("token-out-of-range", VOCABULARY)),
    ],
)
def test_what_has_no_likelihood_is_refused(
    runner: OnnxRuntimeRunner, context: Any, continuation: Any, longest: int, told: Any
) -> None:
    with raises(ComparisonError, *told):
        LikelihoodScorer(runner, longest, VOCABULARY).score(
            [ContinuationRequest(context, continuation)]
        )


ITEMS = [
    {"query": "the value of", "choices": ["list", "string type"], "gold": 0},
    {"query": "Question: the a", "choices": ["class", "object call name"], "gold": 1},
    {"query": "if that is", "choices": ["in", "to on"], "gold": 1},
]
SCHEMA = [{"context_options": ["the list is", "a type of"], "continuation": "that", "gold": 1}]


def write_task(folder: Path, name: str, items: Sequence[Any]) -> TaskOptions:
    lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return TaskOptions((name,), folder)


def in_folder(folder: Path, **how: Any) -> ModelFolder:
    return find_model(language_model(folder, **how))


def random_items(number: int, choices: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)

    def words(most: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, most)))

    return [
        {"query": words(6), "choices": [words(4) for _ in range(choices)], "gold": 0}
        for _ in range(number)
    ]


def test_scores_follow_lm_eval_s_definitions(tmp_path: Path) -> None:
    folder = in_folder(tmp_path / "m", noise=0.5)
    codec = task_texts(folder)
    with OnnxRuntimeRunner(folder.onnx, threads=1) as runner:
        tasks = write_task(tmp_path, "words", ITEMS)
        score = score_tasks(tasks, runner, folder, vocabulary=32)[0]
        for number, item in enumerate(ITEMS):
            prompt = str(item["query"])
            prompt += "\nAnswer:" if prompt.startswith("Question:") else ""
            choices: Any = item["choices"]
            requested = [ContinuationRequest.of(codec, prompt, f" {text}") for text in choices]
            sums = np.array([one_by_one(runner, entry)[0] for entry in requested])
            lengths = np.array([len(text) for text in choices])
            assert score.log_likelihoods[number] == pytest.approx(sums, abs=1e-5)
            assert score.metrics["acc"][number] == (sums.argmax() == item["gold"])
            normed = (sums / lengths).argmax() == item["gold"]
            assert score.metrics["acc_norm"][number] == normed
        # Several contexts of one continuation have no acc_norm.
        tasks = write_task(tmp_path, "schema", SCHEMA)
        pairs = read_task(tmp_path, "schema").items[0].pairs
        assert pairs == (("the list is", " that"), ("a type of", " that"))
        score = score_tasks(tasks, runner, folder, vocabulary=32)[0]
        assert list(score.metrics) == ["acc"]


def test_spaces_between_text_and_choice_go_with_the_choice(tmp_path: Path) -> None:
    codec, of = task_texts(in_folder(tmp_path)), ContinuationRequest.of
    assert of(codec, "the a  ", "list") == of(codec, "the a", "  list")
    assert of(codec, "", "list") == ContinuationRequest((0,), tuple(codec.encode("list")))
    assert codec.decode(codec.encode("the list")) == "the list"


@pytest.mark.usefixtures("no_timing")
def test_compare_scores_both_arms_on_the_same_items(tmp_path: Path) -> None:
    write_task(tmp_path, "words", random_items(60, 2))
    write_task(tmp_path, "schema", SCHEMA)
    arms = map(str, language_models(tmp_path))
    call = ["compare", *arms, "-o", str(tmp_path / "out"), "-q", "--eval-tokens", "64"]
    tasks = ["--tasks", "words,schema", "--task-data", str(tmp_path), "--task-limit", "50"]
    assert run([*call, *tasks]) == 0
    accuracy = present(ComparisonReport.read(tmp_path / "out" / "report.json").accuracy)
    names = [(task.task, task.metric, task.items) for task in accuracy.tasks]
    assert names == [("words", "acc", 50), ("words", "acc_norm", 50), ("schema", "acc", 1)]
    first = accuracy.tasks[0]
    assert first.difference.value == pytest.approx(first.candidate - first.baseline, abs=1e-12)
    assert first.difference.ci95[0] < first.difference.value < first.difference.ci95[1]
    assert "50 items" in first.source


def test_lm_eval_s_directions_are_kept_and_its_log_likelihoods_are_losses() -> None:
    samples = [
        {"doc_id": number, "filter": "none", "metrics": ["perplexity", "acc", "brier", "f1"],
         "perplexity": -number - 1.0, "acc": 1, "brier": 0.25, "f1": (0, 1)}
        for number in (1, 0)
    ]  # fmt: skip
    result = {"perplexity": False, "acc": True, "brier": False, "f1": True}
    scores = lm_eval_tasks._scores("lambada", 1, samples, result, QUIET)
    assert scores.lower_is_better == {"log_perplexity", "brier"}
    assert {name: values.tolist() for name, values in scores.metrics.items()} == {
        "log_perplexity": [1.0, 2.0], "acc": [1, 1], "brier": [0.25, 0.25],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("broken", "field"),
    [
        ("{", "JSON"),
        ("[]", "JSON"),
        ({"query": "\ud800", "choices": ["a", "b"], "gold": 0}, "JSON"),
        ({"query": "the", "choices": ["a"], "gold": 0}, '"choices"'),
        ({"query": "the", "choices": ["a", ""], "gold": 0}, '"choices"'),
        ({"choices": ["a", "b"], "gold": 0}, '"query"'),
        ({"query": "the", "choices": ["a", "b"], "gold": 2}, '"gold" is 2'),
        ({"query": "the", "choices": ["a", "b"], "gold": True}, "True"),
        ({"query": "the", "choices": ["a", "b"]}, "None"),
        ({"context_options": ["a", "b"], "gold": 0}, '"continuation"'),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, broken: Any, field: str) -> None:
    write_task(tmp_path, "words", [ITEMS[0], broken])
    with raises(TaskError, "broken-task-file", "line 2") as caught:
        read_task(tmp_path, "words")
    assert field in caught.value.message
    assert '"gold"' in caught.value.hint
    assert len(read_task(tmp_path, "words", limit=1).items) == 1


@pytest.mark.parametrize(
    ("folder", "task", "told"),
    [
        (".", "arc_eazy", ("unknown-task", "'arc_eazy'", "arc_easy?", "arc_easy, empty, spoilt")),
        (".", "../arc_easy", ("unknown-task", "'../arc_easy'")),
        (".", "empty", ("broken-task-file", "empty")),
        ("none", "arc_easy", ("unknown-task", "none")),
        (".", "spoilt", ("broken-task-file", "spoilt.jsonl")),
    ],
)
def test_unknown_and_empty_tasks_are_named(
    tmp_path: Path, folder: str, task: str, told: Any
) -> None:
    for name, items in (("arc_easy", ITEMS), ("empty", []), ("spoilt", [])):
        write_task(tmp_path, name, items)
    (tmp_path / "spoilt.jsonl").write_bytes(b"\xff")
    with raises(TaskError, *told[:3]) as caught:
        read_task(tmp_path / folder, task)
    assert all(words in caught.value.hint for words in told[3:])


def test_a_model_without_tokenizer_or_logits_is_told(tmp_path: Path) -> None:
    folder = in_folder(tmp_path / "m")
    with raises(TaskError, "no-tokenizer", "tokenizer.json"):
        task_texts(ModelFolder(folder.onnx, None, {}))
    with raises(TaskError, "config-missing", "config.json"):
        task_texts(ModelFolder(folder.onnx, folder.tokenizer, {}))
    model, out = str(encoder(tmp_path / "e")), str(tmp_path / "o")
    write_task(tmp_path, "words", ITEMS)
    tasks = ["-o", out, "--tasks", "words", "--task-data", str(tmp_path)]
    for call in (["compare", model, model], ["evaluate", model]):
        with ends_in(ComparisonError, "task-for-another-model", model):
            assert run([*call, *tasks]) == 2
    with pytest.raises(UsageError):
        TaskOptions(("words",), tmp_path, task_limit=0)


def test_one_model_is_scored_item_by_item(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path, "words", ITEMS)
    out = tmp_path / "scores.json"
    model = str(language_model(tmp_path / "m", noise=0.5))
    call = ["evaluate", model, "-o", str(out), "-q", "--task-data", str(tmp_path), "--tasks"]
    assert run([*call, "words"]) == 0
    report = EvaluationReport.read(out)
    scores = [(score.task, score.metric) for score in report.scores]
    assert scores == [("words", "acc"), ("words", "acc_norm")]
    assert report.scores[0].value == pytest.approx(np.mean(report.scores[0].items), abs=1e-12)
    assert f"{report.scores[0].value:.4f}" in capsys.readouterr().out
    assert len(report.made_from["model"]) == 64
    assert run([*call, "words,,"]) == 2
    with ends_in(TaskError, "unknown-task", "'wordz'", "words?"):
        assert run([*call, "wordz"]) == 2


def test_a_librarys_own_error_is_one_of_the_task() -> None:
    with (
        raises(TaskError, "lm-eval-failed", "arc_easy", "no route"),
        failing_as_task("arc_easy", ""),
    ):
        raise RuntimeError("no route\nto the hub")


def test_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    model = str(language_model(tmp_path))
    call = ["compare", model, model, "-o", str(tmp_path / "o"), "-q", "--eval-tokens", "64"]
    for words in ([*call, "--tasks", "arc_easy"], ["lm-eval", "ls"]):
        assert run(words) == 2
        assert "depthcut[eval]" in capsys.readouterr().err
