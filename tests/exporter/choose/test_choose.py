"""From scores to a plan on models of three layers: by scores, by damage, and by right answers."""

from __future__ import annotations

import json
import math
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter import cli
from exporter.artifacts import ImportanceReport
from exporter.choose.budgets.budget import Budget
from exporter.choose.selection.search_options import SearchOptions
from exporter.choose.selection.task_items import part_items, read_tasks
from exporter.errors import (
    CalibrationError,
    ModelSourceError,
    OptionError,
    PlanError,
    ScoringError,
    TaskError,
    UsageError,
)
from tests.exporter.made_plans import made_planner, names_of
from tests.raising import ends_in, raises
from tests.reading import in_file
from tests.tiny_models import hook_count, skipped, tiny_loaded, tiny_tokenizer

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.choose.budgets.judges import parted  # noqa: E402
from exporter.models.texts.mixtures import text_of_report  # noqa: E402
from exporter.score import ScoreOptions, score  # noqa: E402

SEARCHES = ("one-shot", "greedy")
NAMES: list[Any] = list(product(range(3), ("attention", "mlp")))


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def report(loaded: Any, cache: Path) -> ImportanceReport:
    options = ScoreOptions(calibration=("self",), samples=8, sequence_length=16, seed=3)
    return score(loaded, options, cache_dir=cache)


@pytest.fixture
def choose(loaded: Any, report: ImportanceReport, cache: Path) -> Any:
    """The plan for numbers of sublayers."""

    def chosen(
        counts: Any, search: Any, protect: Any = (), shortlist: int = 12, **more: Any
    ) -> Any:
        options = SearchOptions(search, tokens=96, protect=protect, shortlist=shortlist)
        given = {"loaded": loaded, "report": report, "work": Path(tempfile.mkdtemp(dir=cache))}
        given |= {"cache_dir": cache, **more}
        return made_planner(budget=Budget(**counts), search=options, **given).plan().plan

    return chosen


@pytest.fixture
def kl(loaded: Any, cache: Path, report: ImportanceReport) -> Any:
    """The whole model's and the cut one's distributions at every second position, plainly."""

    def measured(names: Any, part: str = "searched") -> float:
        text = text_of_report(loaded, report.calibration, cache_dir=cache)
        ids = torch.tensor(getattr(parted(text, 0.25), part).input_ids)
        with torch.no_grad():
            whole = loaded.model(ids).logits.log_softmax(-1)
            with skipped(loaded.model, names):
                other = loaded.model(ids).logits.log_softmax(-1)
        return float((whole.exp() * (whole - other)).sum(-1)[:, :-1:2].mean())

    return measured


def test_greedy_takes_the_best_of_all_single_ones(choose: Any, kl: Any, loaded: Any) -> None:
    plan = choose({"joint": 1}, "greedy", shortlist=0)
    assert names_of(plan) == [min(NAMES, key=lambda name: kl([name]))]
    # float32 sums over the vocabulary, in another order.
    assert plan.predicted["kl"] == pytest.approx(kl(names_of(plan), "reported"), abs=1e-5)
    assert plan.predicted_on == "unseen"
    assert hook_count(loaded.model) == 0


@pytest.mark.parametrize("search", SEARCHES)
def test_protection_holds(search: str, choose: Any) -> None:
    protect = ("first", "attention:2")
    plan = choose({"attention": 1, "mlp": 2}, search, protect)
    assert sorted(names_of(plan)) == [(1, "attention"), (1, "mlp"), (2, "mlp")]
    assert plan.budget["protect"] == "first, attention:2"
    with raises(PlanError, "too-many", 2, 1):
        choose({"attention": 2}, search, protect)
    with raises(PlanError, "too-many", 2, 1):
        choose({"block": 2}, search, ("first", "mlp:2"))


@pytest.mark.parametrize("search", SEARCHES)
def test_everything_is_dropped_only_where_it_is_allowed(search: str, choose: Any, kl: Any) -> None:
    for counts in ({"attention": 3, "mlp": 3}, {"joint": 6}, {"block": 3}):
        with pytest.raises(PlanError):
            choose(counts, search)
        if "block" not in counts:
            plan = choose(counts, search, allow_all=True)
            assert {*names_of(plan)} == {*NAMES}
    if search == "greedy":
        assert plan.predicted["kl"] == pytest.approx(kl(NAMES, "reported"), abs=1e-5)  # float32
    assert len({*names_of(choose({"joint": 5}, search))}) == 5
    with raises(PlanError, "too-many", 6, 5):
        choose({"joint": 6}, search, ("mlp:0",), allow_all=True)


def test_the_scores_of_another_model_or_text(
    report: ImportanceReport, loaded: Any, choose: Any
) -> None:
    other = tiny_loaded("llama")
    object.__setattr__(other, "ref", loaded.ref.model_copy(update={"sha256": "f" * 64}))
    with raises(PlanError, "another-model", "ffffffffffff"):
        choose({"joint": 1}, "greedy", loaded=other)
    calibration = report.calibration.model_copy(update={"sha256": "f" * 64})
    changed = report.model_copy(update={"calibration": calibration})
    with raises(CalibrationError, "text-changed"):
        choose({"joint": 1}, "greedy", report=changed)
    # Named by the user, it may be any.
    assert choose({"joint": 1}, "greedy", report=changed, calibration=("self",)).deletions


def test_one_shot_loads_nothing(report: ImportanceReport, tmp_path: Path) -> None:
    planner = made_planner(None, report, tmp_path, Budget(attention=1), "one-shot")
    planner._load = lambda: pytest.fail("loaded")
    plan = planner.plan().plan
    assert (plan.budget, plan.predicted) == ({"attention": 1}, {})


def _call(report: ImportanceReport, folder: Path, source: str) -> list[str]:
    model = report.model.model_copy(update={"source": source})
    scores = report.model_copy(update={"model": model}).write(folder / "importance.json")
    call = ["plan", str(scores), "-o", str(folder / "plan.json"), "--drop-attn", "1"]
    return [*call, "--search", "greedy", "-q"]


def test_the_command_searches(
    tmp_path: Path, loaded: Any, report: ImportanceReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: list[str] = []
    monkeypatch.setattr(
        "exporter.choose.budgets.making.load_model",
        lambda source, **_: (sources.append(source), loaded)[1],
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "unused"))
    call = _call(report, tmp_path, "the-model")
    call += [*in_file(tmp_path, ["search_tokens: 64"]), "--protect", "last"]
    assert cli.run([*call, "--calibration", "self"]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["budget"]["search"] == "greedy"
    assert plan["predicted"]["kl"] > 0
    assert not (tmp_path / ".depthcut").exists()
    assert cli.run([*call, "--calibration", "self", "--model", "mine"]) == 0
    assert sources == ["the-model", "mine"]


def test_scores_fetch_no_model_that_the_user_did_not_name(
    tmp_path: Path, report: ImportanceReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may have written the scores; a hub id on the command line is asked for."""
    flags: list[bool] = []

    def fetch(*_: Any, **__: Any) -> str:
        from huggingface_hub import constants

        flags.append(not constants.HF_HUB_OFFLINE)
        raise OSError("not here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    call = _call(report, tmp_path, "owner/name")
    assert cli.run(call) == 2
    assert cli.run([*call, "--model", "owner/name"]) == 2
    assert flags == [False, True]


def test_an_interrupted_command_leaves_its_journal(
    tmp_path: Path, choose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "damages.jsonl"

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("exporter.choose.budgets.search.Search._trimmed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            choose({"joint": 2}, "greedy", work=tmp_path)
    lines = journal.read_text().splitlines()
    assert len(lines) > 6
    choose({"joint": 2}, "greedy", work=tmp_path)
    assert journal.read_text().splitlines() == lines  # Greedy has nothing left to measure.


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("server", ["llama.cpp", "vllm"])
def test_what_a_runtime_needs_stays(choose: Any, search: Any, server: Any) -> None:
    plan = choose({"attention": 2}, search, server=server)
    assert {deletion.layer for deletion in plan.deletions} == {1, 2}
    assert plan.budget["for"] == server
    with pytest.raises(PlanError):
        choose({"attention": 3}, search, server=server)
    assert len(choose({"attention": 3}, search).deletions) == 3
    whole = [choose({"block": 2}, "one-shot", server=name).deletions for name in (server, None)]
    assert whole[0] == whole[1]  # blocks go everywhere


ODDS, TEXT = 30, 31
"""Of the hidden state: what alone tells two answers apart, and what alone moves all others."""
NEAR, FAR = ("w10", "w11"), ("w20", "w21")
"""Answers that ODDS tells apart, and answers that TEXT does."""


@pytest.fixture(scope="module")
def planted() -> Any:
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
        for words, place in ((NEAR, ODDS), (FAR, TEXT)):
            for word, value in zip(words, (1.0, -1.0), strict=True):
                head[_id(made, word)] = 0
                head[_id(made, word), place] = value
    return made


def _id(loaded: Any, word: str) -> int:
    return int(loaded.tokenizer(word, add_special_tokens=False).input_ids[0])


@pytest.fixture(scope="module")
def its_report(planted: Any, cache: Path) -> ImportanceReport:
    options = ScoreOptions(calibration=("self",), samples=8, sequence_length=16)
    return score(planted, options, cache_dir=cache)


@pytest.fixture
def answering(planted: Any, its_report: ImportanceReport, tmp_path: Path) -> Any:
    """The planner that drops an attention by an objective."""

    def made(objective: str, loaded: Any = planted, **more: Any) -> Any:
        search = SearchOptions(search="greedy", objective=objective, **more)
        its = its_report.model_copy(update={"model": loaded.ref})
        work = tmp_path / "work"
        return made_planner(loaded, its, work, Budget(attention=1), search, cache_dir=tmp_path)

    return made


def _items(path: Path, answers: tuple[str, str] = NEAR, number: int = 24, first: int = 0) -> str:
    queries = (f"w{30 + at % 29} w{30 + at // 29}" for at in range(first, first + number))
    lines = [{"query": query, "choices": list(answers), "gold": 0} for query in queries]
    path.write_text("\n".join(map(json.dumps, lines)))
    return f"tasks:{path}"


def test_an_attention_that_only_text_needs_goes_where_answers_count(
    answering: Any, tmp_path: Path
) -> None:
    near, far = _items(tmp_path / "near.jsonl"), _items(tmp_path / "far.jsonl", FAR)
    for objective, layer in (("kl", 1), ("perplexity", 1), (near, 0), (far, 1)):
        assert names_of(answering(objective).plan().plan) == [(layer, "attention")]


def test_a_plan_tells_what_it_was_chosen_and_judged_on(answering: Any, tmp_path: Path) -> None:
    path = tmp_path / "near.jsonl"
    plan = answering(_items(path), items=6, judged_items=10).plan().plan
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
    answering: Any, planted: Any, tmp_path: Path
) -> None:
    lines = [{"query": "w30 w30", "choices": list(NEAR), "gold": 0}]
    lines += [{"query": f"w30 w30{' ' * n}", "choices": list(NEAR), "gold": 1} for n in (1, 2, 3)]
    path = tmp_path / "odds.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    plan = answering(f"tasks:{path}", items=2).plan().plan
    golds = [item.gold for item in _parted(path, items=2)[0][1]]
    ids = torch.tensor([[_id(planted, "w30"), _id(planted, "w30")]])
    expected = []
    for cut in ([], names_of(plan)):
        with torch.no_grad(), skipped(planted.model, cut):
            odds = planted.model(ids).logits[0, -1, [_id(planted, word) for word in NEAR]]
        expected.append([float(odds.log_softmax(-1)[gold]) for gold in golds])
    changes, figures = np.subtract(expected[1], expected[0]), plan.predicted
    rows = {row.metric: row for row in plan.predicted_tasks}
    assert rows["choice_log_prob"].baseline == pytest.approx(np.mean(expected[0]), abs=1e-5)
    assert figures["task_log_prob"] == pytest.approx(np.mean(expected[1]), abs=1e-5)
    assert figures["task_log_prob_change"] == pytest.approx(changes.mean(), abs=1e-5)
    error = changes.std(ddof=1) / math.sqrt(len(changes))
    assert figures["task_log_prob_change_std_error"] == pytest.approx(error, abs=1e-5)
    assert figures["task_accuracy"] == golds.count(0) / 2


def test_a_mixture_has_alike_many_items_of_each(answering: Any, tmp_path: Path) -> None:
    files = [str(tmp_path / f"{name}.jsonl") for name in ("near", "far")]
    _items(tmp_path / "near.jsonl", number=30)
    _items(tmp_path / "far.jsonl", FAR, number=12)
    plan = answering(f"tasks:{','.join(files)}", items=8).plan().plan
    assert [(ref.source, ref.samples) for ref in plan.chosen_on] == [(file, 4) for file in files]
    assert [ref.samples for ref in plan.judged_on if ref.unit == "item"] == [8, 8]
    rows = {(row.task, row.metric): row.candidate for row in plan.predicted_tasks}
    means = np.mean([rows["near", "choice_log_prob"], rows["far", "choice_log_prob"]])
    assert plan.predicted["task_log_prob"] == pytest.approx(means)


def _parted(path: Path, *others: Path, **more: Any) -> Any:
    search = SearchOptions(search="greedy", objective="tasks:a.jsonl", **more)
    return part_items(read_tasks([path, *others]), search)


def test_no_item_steers_and_judges_and_the_seed_parts_them(tmp_path: Path) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    _items(path, number=10)
    path.write_text("\n".join([path.read_text()] * 2))
    _items(other, number=20)  # the first ten are those of the other file
    for files in ([path], [path, other]):
        parts = _parted(*files)
        steering, judged = ({item for pair in parts for item in pair[n]} for n in (0, 1))
        assert not steering & judged
        assert len(steering) + len(judged) == 10 * len(files)
    one, again, changed = (_parted(other, seed=seed) for seed in (0, 0, 1))
    assert one == again != changed
    assert [len(part) for part in one[0]] == [10, 10]


def test_what_is_no_file_of_items_is_refused(tmp_path: Path) -> None:
    few, enough, same = (tmp_path / f"{name}.jsonl" for name in ("few", "enough", "same"))
    for path, number in ((few, 3), (enough, 4), (same, 4), (tmp_path / "items.txt", 4)):
        _items(path, number=number)
    with raises(TaskError, "few-items", 3, 4):
        _parted(few)
    assert [len(part) for part in _parted(enough)[0]] == [2, 2]
    with raises(TaskError, "no-task-file", "items.txt"):
        read_tasks([tmp_path / "items.txt"])
    with raises(TaskError, "task-named-twice", same):
        read_tasks([enough, same])


@pytest.mark.parametrize("line", ["", '{"query": "w3", "choices": ["w4", "w5"], "gold": 2}'])
def test_files_without_items_are_refused_before_a_model_is_loaded(
    answering: Any, tmp_path: Path, line: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    planner = answering(f"tasks:{path}")
    planner._load = lambda: pytest.fail("loaded")
    with pytest.raises(TaskError):
        planner.plan()


def test_an_encoder_answers_no_items(answering: Any, tmp_path: Path) -> None:
    encoder = tiny_loaded("bert", tiny_tokenizer())
    with raises(ScoringError, "no-next-token"):
        answering(_items(tmp_path / "a.jsonl"), encoder).plan()


def test_what_is_no_objective_is_refused_and_numbers_of_items_are_for_items() -> None:
    for objective in ("rank", "tasks:", "tasks:a.jsonl,", "tasks"):
        with raises(OptionError, "", "--objective"):
            SearchOptions(search="greedy", objective=objective)
    for name in ("items", "judged_items"):
        with pytest.raises(OptionError):
            SearchOptions(search="greedy", **{name: 7})
        assert SearchOptions(search="greedy", objective="tasks:a.jsonl", **{name: 7}).task_files
    files = SearchOptions(search="greedy", objective="tasks:a.jsonl,b/c.jsonl").task_files
    assert files == (Path("a.jsonl"), Path("b/c.jsonl"))
    assert SearchOptions(search="greedy", objective="kl").task_files == ()


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
