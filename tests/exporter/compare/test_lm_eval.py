"""depthcut's model in lm-eval: the same scores as our own, and its command line. Tier ``eval``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporter.cli import run
from exporter.compare.tasks.choosing import evaluate
from exporter.compare.tasks.items import read_task
from exporter.compare.tasks.likelihood import open_scorer
from exporter.errors import TaskError
from tests.compared import language_model
from tests.raising import raises
from tests.text_graphs import WORDS

pytestmark = pytest.mark.eval


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    language_model(tmp_path / "m", config={"vocab_size": 32}, noise=0.5)
    rng = np.random.default_rng(0)
    items = [
        {
            "query": f"Question: {' '.join(rng.choice(WORDS, 5))}",
            "choices": [" ".join(rng.choice(WORDS, rng.integers(1, 4))) for _ in range(3)],
            "gold": int(rng.integers(3)),
        }
        for _ in range(12)
    ]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, items)))
    return tmp_path


@pytest.fixture
def model(folder: Path) -> Iterator[Any]:
    from exporter.compare.tasks.lm_eval_model import PathLM

    opened = PathLM(str(folder / "m"), threads=1, max_length=64)
    yield opened
    opened.close()


def test_the_model_is_named_as_lm_eval_names_models_and_once(folder: Path) -> None:
    from exporter.compare.tasks.lm_eval_model import PathLM

    name = str(folder / "m")
    PathLM(pretrained=name, threads=1, max_length=64).close()
    for both in ({}, {"path": name, "pretrained": name}):
        with raises(TaskError, "one-model"):
            PathLM(**both)


def task(folder: Path) -> dict[str, Any]:
    return {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "words.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def test_lm_eval_s_scores_of_our_model_are_our_own(folder: Path, model: Any) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    result = simple_evaluate(
        model=model,
        tasks=[task(folder)],
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    with ExitStack() as stack:
        scorer, codec = open_scorer(folder / "m", stack, threads=1)
        own = evaluate(read_task(folder, "words"), scorer, codec)
    samples = sorted(result["samples"]["words"], key=lambda sample: sample["doc_id"])
    for metric in ("acc", "acc_norm"):
        assert [sample[metric] for sample in samples] == own.metrics[metric].tolist()
        assert result["results"]["words"][f"{metric},none"] == own.metrics[metric].mean()
    theirs = [[pair[0] for pair in sample["filtered_resps"]] for sample in samples]
    assert np.allclose(theirs, np.array(own.log_likelihoods), rtol=0, atol=1e-5)


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def test_whole_texts_are_predicted_token_by_token(model: Any) -> None:
    text = "the value of a list is the string " * 20  # longer than the model's 64 positions
    values = model.loglikelihood_rolling([asked(text), asked("the value")])
    ids = model.tok_encode("the value")
    pairs = [((), [0], ids[:1]), ((), [0, ids[0]], ids[1:])]
    want = sum(pair[0] for pair in model._loglikelihood_tokens(pairs))
    assert values[1] == pytest.approx(want, abs=1e-5)
    assert values[0] < 10 * values[1]


def test_generation_ends_where_the_task_says(model: Any) -> None:
    whole = model.generate_until([asked("the value", {"until": [], "max_gen_toks": 6})])[0]
    words = whole.split()
    assert len(words) >= 3  # of six; the model has tokens without a word too
    stop = words[2]
    cut = model.generate_until([asked("the value", {"until": stop, "max_gen_toks": 6})])[0]
    assert cut == whole.split(stop)[0]
    with raises(TaskError, "not-greedy", "do_sample"):
        model.generate_until([asked("the", {"until": [], "do_sample": True, "temperature": 1})])


def test_lm_eval_s_own_command_line_knows_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    (folder / "tasks").mkdir()
    (folder / "tasks" / "words.yaml").write_text(yaml.safe_dump(task(folder)))
    monkeypatch.setattr(sys, "argv", ["depthcut"])
    call = ["lm-eval", "run", "--model", "depthcut", "--model_args", f"path={folder / 'm'}"]
    more = ["--tasks", "words", "--include_path", str(folder / "tasks"), "--limit", "3"]
    assert run([*call, *more]) == 0
    assert "acc_norm" in capsys.readouterr().out
    missing = [*call[:-1], f"path={folder / 'none'}", *more]
    assert run(missing) == 2
    assert "none does not exist" in capsys.readouterr().err


def test_unknown_tasks_are_named_with_their_neighbours() -> None:
    from exporter.compare.tasks.choosing import check_known

    with raises(TaskError, "unknown-task", "'arc_eazy'", "arc_easy?") as caught:
        check_known("arc_eazy", ["arc_easy", "piqa"])
    assert "--task-data" in caught.value.hint
    check_known("piqa", ["arc_easy", "piqa"])


def test_items_that_the_hub_doesn_t_give_are_told(folder: Path) -> None:
    from exporter.compare.tasks.choosing import run_lm_eval

    with ExitStack() as stack:
        scorer, codec = open_scorer(folder / "m", stack, threads=1)
        with raises(TaskError, "lm-eval-failed", "arc_easy") as caught:
            run_lm_eval(["arc_easy"], scorer, codec, limit=2)
    assert "--task-data" in caught.value.hint
