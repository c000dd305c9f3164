"""Searches that keep right answers: on items of their own, judged on others."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter import cli
from exporter.artifacts import ImportanceReport
from exporter.choose.budgets.budget import Budget
from exporter.choose.budgets.planner import Planner
from exporter.choose.budgets.settings import PlanSettings
from exporter.choose.selection.search_options import SearchOptions
from exporter.choose.selection.task_items import part_items, read_tasks
from exporter.errors import (
    ModelSourceError,
    OptionError,
    ScoringError,
    TaskError,
    UsageError,
)
from tests.raising import ends_in, raises
from tests.reading import in_file
from tests.tiny_models import tiny_loaded, tiny_tokenizer

torch = pytest.importorskip("torch", reason="the planted model is PyTorch's")
pytestmark = pytest.mark.torch

ODDS, TEXT = 30, 31
"""Of the hidden state: what alone tells two answers apart, and what alone moves all others."""
NEAR, FAR = ("w10", "w11"), ("w20", "w21")
"""Answers that ODDS tells apart, and answers that TEXT does."""


@pytest.fixture(scope="module")
def loaded() -> Any:
    """Attention 0 writes into TEXT, 1 into ODDS, 2 into both; nothing else writes anything."""
    made = tiny_loaded("llama", tiny_tokenizer(), attention_bias=True)
    model, head = made.model, made.model.lm_head.weight
    with torch.no_grad():
        model.model.embed_tokens.weight[:, [ODDS, TEXT]] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.self_attn.o_proj.bias.zero_()
            layer.mlp.down_proj.weight.zero_()
        biases = [layer.self_attn.o_proj.bias for layer in model.model.layers]
        biases[0][TEXT], biases[1][ODDS] = 0.1, 0.1
        biases[2][[TEXT, ODDS]] = 0.2
        head[:, ODDS] = 0
        head[:, TEXT] = torch.linspace(-2, 2, len(head))
        for word, value in zip(NEAR, (1.0, -1.0), strict=True):
            head[_id(made, word)] = 0
            head[_id(made, word), ODDS] = value
        for word, value in zip(FAR, (1.0, -1.0), strict=True):
            head[_id(made, word)] = 0
            head[_id(made, word), TEXT] = value
    return made


def _id(loaded: Any, word: str) -> int:
    return int(loaded.tokenizer(word, add_special_tokens=False).input_ids[0])


@pytest.fixture(scope="module")
def report(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> ImportanceReport:
    from exporter.score import ScoreOptions, score

    options = ScoreOptions(calibration=("self",), samples=8, sequence_length=16)
    return score(loaded, options, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def chosen(loaded: Any, report: ImportanceReport, tmp_path: Path) -> Any:
    def made(objective: str, **more: Any) -> Any:
        search = SearchOptions(search="greedy", objective=objective, **more)
        return Planner(
            report, lambda: loaded, Budget(attention=1), PlanSettings(search),
            work=tmp_path / "work", cache_dir=tmp_path,
        ).plan().plan  # fmt: skip

    return made


def _items(path: Path, answers: tuple[str, str] = NEAR, number: int = 24, first: int = 0) -> str:
    lines = [
        {"query": f"w{30 + at % 29} w{30 + at // 29}", "choices": list(answers), "gold": 0}
        for at in range(first, first + number)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return f"tasks:{path}"


def _layers(plan: Any) -> list[int]:
    return [deletion.layer for deletion in plan.deletions]


def test_an_attention_that_only_text_needs_goes_where_answers_count(
    chosen: Any, tmp_path: Path
) -> None:
    near = _items(tmp_path / "near.jsonl")
    assert _layers(chosen("kl")) == [1]
    assert _layers(chosen("perplexity")) == [1]
    assert _layers(chosen(near)) == [0]


def test_where_answers_need_what_text_needs_both_choose_alike(chosen: Any, tmp_path: Path) -> None:
    assert _layers(chosen(_items(tmp_path / "far.jsonl", FAR))) == [1]


def _plain(loaded: Any, gone: int | None) -> tuple[float, float]:
    """The log-probability of the first near answer against the second, and whether it is more."""
    from exporter.models.ablation.branch_replacements import NOTHING, branches_replaced
    from graph_passes.types import SublayerRef

    cut = {} if gone is None else {SublayerRef(gone, "attention"): NOTHING}
    ids = torch.tensor([[_id(loaded, "w30"), _id(loaded, "w30")]])
    with torch.no_grad(), branches_replaced(loaded.model, cut):
        logits = loaded.model(ids).logits[0, -1]
    odds = logits[[_id(loaded, word) for word in NEAR]].log_softmax(-1)
    return float(odds[0]), float(odds[0] > odds[1])


def test_a_plan_tells_what_it_was_chosen_and_judged_on(
    chosen: Any, loaded: Any, tmp_path: Path
) -> None:
    path = tmp_path / "near.jsonl"
    plan = chosen(_items(path), items=6, judged_items=10)
    (steering,), (text, judged) = plan.chosen_on, plan.judged_on
    assert (steering.unit, steering.samples, steering.source) == ("item", 6, str(path))
    assert (judged.unit, judged.samples, judged.source) == ("item", 10, str(path))
    assert text.unit == "sample"
    assert steering.sha256 == judged.sha256
    assert steering.ids_sha256 != judged.ids_sha256
    assert plan.budget["objective"] == "tasks:near.jsonl"
    assert [(row.task, row.metric, row.items) for row in plan.predicted_tasks] == [
        ("near", "acc", 10), ("near", "choice_log_prob", 10),
    ]  # fmt: skip


def test_the_figures_are_those_of_both_models_on_the_items_that_judge(
    chosen: Any, loaded: Any, tmp_path: Path
) -> None:
    lines = [{"query": "w30 w30", "choices": list(NEAR), "gold": 0}]
    lines += [{"query": f"w30 w30{' ' * n}", "choices": list(NEAR), "gold": 1} for n in (1, 2, 3)]
    path = tmp_path / "odds.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    plan = chosen(f"tasks:{path}", items=2)
    (gone,) = _layers(plan)
    whole, cut = _plain(loaded, None)[0], _plain(loaded, gone)[0]
    rows = {row.metric: row for row in plan.predicted_tasks}
    golds = _judged_golds(path, 2)
    expected = [
        [math.log(p if gold == 0 else 1 - p) for gold in golds]
        for p in (math.exp(whole), math.exp(cut))
    ]
    changes = np.subtract(expected[1], expected[0])
    figures = plan.predicted
    assert rows["choice_log_prob"].baseline == pytest.approx(np.mean(expected[0]), abs=1e-5)
    assert figures["task_log_prob"] == pytest.approx(np.mean(expected[1]), abs=1e-5)
    assert figures["task_log_prob_change"] == pytest.approx(changes.mean(), abs=1e-5)
    error = changes.std(ddof=1) / math.sqrt(len(changes))
    assert figures["task_log_prob_change_std_error"] == pytest.approx(error, abs=1e-5)
    assert figures["task_accuracy"] == golds.count(0) / 2


def _judged_golds(path: Path, items: int) -> list[int]:
    ((_, judged),) = _parted(path, items=items)
    return [item.gold for item in judged]


def test_a_mixture_has_alike_many_items_of_each(chosen: Any, tmp_path: Path) -> None:
    _items(tmp_path / "near.jsonl", number=30)
    _items(tmp_path / "far.jsonl", FAR, number=12)
    plan = chosen(f"tasks:{tmp_path / 'near.jsonl'},{tmp_path / 'far.jsonl'}", items=8)
    assert [(ref.source, ref.samples) for ref in plan.chosen_on] == [
        (str(tmp_path / "near.jsonl"), 4), (str(tmp_path / "far.jsonl"), 4),
    ]  # fmt: skip
    assert [ref.samples for ref in plan.judged_on if ref.unit == "item"] == [8, 8]
    rows = {(row.task, row.metric): row.candidate for row in plan.predicted_tasks}
    means = np.mean([rows["near", "choice_log_prob"], rows["far", "choice_log_prob"]])
    assert plan.predicted["task_log_prob"] == pytest.approx(means)


def _parted(path: Path, *others: Path, **more: Any) -> Any:
    return part_items(read_tasks([path, *others]), SearchOptions(search="greedy", **{
        "objective": "tasks:a.jsonl", **more}))  # fmt: skip


def test_no_item_steers_and_judges(tmp_path: Path) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    _items(path, number=10)
    path.write_text("\n".join([path.read_text()] * 2))
    _items(other, number=20)  # the first ten are those of the other file
    for files in ([path], [path, other]):
        parts = _parted(*files)
        steering, judged = ({item for pair in parts for item in pair[n]} for n in (0, 1))
        assert not steering & judged
        assert len(steering) + len(judged) == 10 * len(files)


def test_the_seed_parts_the_items(tmp_path: Path) -> None:
    _items(tmp_path / "a.jsonl")
    one, again, other = (_parted(tmp_path / "a.jsonl", seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one != other
    assert [len(part) for part in one[0]] == [12, 12]


def test_what_is_no_file_of_items_is_refused(tmp_path: Path) -> None:
    few, text = tmp_path / "few.jsonl", tmp_path / "items.txt"
    _items(few, number=3)
    _items(text)
    with raises(TaskError, "few-items", 3, 4):
        _parted(few)
    with raises(TaskError, "no-task-file", text):
        read_tasks([text])
    enough, same = tmp_path / "enough.jsonl", tmp_path / "same.jsonl"
    _items(enough, number=4)
    assert [len(part) for part in _parted(enough)[0]] == [2, 2]
    same.write_bytes(enough.read_bytes())
    with raises(TaskError, "task-named-twice", same):
        read_tasks([enough, same])


@pytest.mark.parametrize("line", ["", '{"query": "w3", "choices": ["w4", "w5"], "gold": 2}'])
def test_files_without_items_are_refused_before_a_model_is_loaded(
    report: ImportanceReport, tmp_path: Path, line: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line)

    def load() -> Any:
        raise AssertionError

    search = SearchOptions(search="greedy", objective=f"tasks:{path}")
    planner = Planner(report, load, Budget(attention=1), PlanSettings(search),
                      work=tmp_path / "work")  # fmt: skip
    with pytest.raises(TaskError):
        planner.plan()


def test_an_encoder_answers_no_items(report: ImportanceReport, tmp_path: Path) -> None:
    encoder = tiny_loaded("bert", tiny_tokenizer())
    search = SearchOptions(search="greedy", objective=_items(tmp_path / "a.jsonl"))
    its = report.model_copy(update={"model": encoder.ref})
    planner = Planner(its, lambda: encoder, Budget(attention=1), PlanSettings(search),
                      work=tmp_path / "work", cache_dir=tmp_path)  # fmt: skip
    with raises(ScoringError, "no-next-token"):
        planner.plan()


@pytest.mark.parametrize("told", ["rank", "tasks:", "tasks:a.jsonl,", "tasks"])
def test_what_is_no_objective_is_refused(told: str) -> None:
    with raises(OptionError, "", "--objective"):
        SearchOptions(search="greedy", objective=told)


def test_numbers_of_items_are_for_items() -> None:
    for name in ("items", "judged_items"):
        with pytest.raises(OptionError):
            SearchOptions(search="greedy", **{name: 7})
        assert SearchOptions(search="greedy", objective="tasks:a.jsonl", **{name: 7}).task_files
    files = SearchOptions(search="greedy", objective="tasks:a.jsonl,b/c.jsonl").task_files
    assert files == (Path("a.jsonl"), Path("b/c.jsonl"))
    assert replace(SearchOptions(search="greedy"), objective="kl").task_files == ()


def test_export_judges_on_no_item_that_may_steer(tmp_path: Path) -> None:
    objective = _items(tmp_path / "near.jsonl")
    _items(tmp_path / "later.jsonl", first=24)
    _items(tmp_path / "mixed.jsonl", first=23)
    call = [
        "export", str(tmp_path / "nowhere"), "-o", str(tmp_path / "out"), "--drop-attn", "1",
        "--search", "greedy", *in_file(tmp_path, [f"objective: {objective}"]),
        "--task-data", str(tmp_path), "--tasks",
    ]  # fmt: skip
    for name in ("near", "mixed"):
        with ends_in(UsageError, "steering-items", name):
            assert cli.run([*call, name]) == 2
    with ends_in(ModelSourceError, "file-missing", "nowhere"):
        assert cli.run([*call, "later"]) == 2
