"""From a report to a plan on models of three layers, held against plain computations."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from exporter import cli
from exporter.artifacts import ImportanceReport, PruningPlan
from exporter.choose.budgets.budget import Budget
from exporter.choose.budgets.planner import Planner
from exporter.choose.budgets.settings import PlanSettings
from exporter.choose.selection.search_options import SearchOptions
from exporter.errors import CalibrationError, PlanError
from tests.raising import raises
from tests.tiny_models import hook_count, skipped, tiny_loaded

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

SEARCHES = ("one-shot", "greedy")


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def report(loaded: Any, cache: Path) -> ImportanceReport:
    from exporter.score import ScoreOptions, score

    options = ScoreOptions(calibration=("self",), samples=8, sequence_length=16, seed=3)
    return score(loaded, options, cache_dir=cache)


def _options(search: Any, **changes: Any) -> SearchOptions:
    return SearchOptions(search=search, tokens=96, **changes)


def _choose(report: Any, loaded: Any, cache: Path, counts: Any, options: Any, **more: Any) -> Any:
    return _planner(report, loaded, cache, counts, options, **more).plan().plan


def _planner(report: Any, loaded: Any, cache: Any, counts: Any, options: Any, **more: Any) -> Any:
    work = more.pop("work", None) or Path(tempfile.mkdtemp(dir=cache))
    return Planner(
        report, lambda: loaded, Budget(**counts), PlanSettings(options, **more), work=work,
        cache_dir=cache,
    )  # fmt: skip


def _names(plan: PruningPlan) -> list[tuple[int, str]]:
    return [(deletion.layer, deletion.kind) for deletion in plan.deletions]


def _kl(loaded: Any, cache: Path, report: Any, names: Any, part: str = "searched") -> float:
    """The whole model's and the cut one's distributions at every second position, plainly."""
    from exporter.choose.budgets.judges import parted
    from exporter.models.texts.mixtures import text_of_report

    text = text_of_report(loaded, report.calibration, cache_dir=cache)
    ids = torch.tensor(getattr(parted(text, 0.25), part).input_ids)
    with torch.no_grad():
        whole = loaded.model(ids).logits.log_softmax(-1)
        with skipped(loaded.model, names):
            other = loaded.model(ids).logits.log_softmax(-1)
    return float((whole.exp() * (whole - other)).sum(-1)[:, :-1:2].mean())


def test_greedy_takes_the_best_of_all_single_ones(loaded: Any, cache: Path, report: Any) -> None:
    plan = _choose(report, loaded, cache, {"joint": 1}, _options("greedy", shortlist=0))
    singles = [(layer, kind) for layer in range(3) for kind in ("attention", "mlp")]
    values = {name: _kl(loaded, cache, report, [name]) for name in singles}
    assert _names(plan) == [min(values, key=values.__getitem__)]
    reported = _kl(loaded, cache, report, _names(plan), "reported")
    # float32 sums over the vocabulary, in another order.
    assert plan.predicted["kl"] == pytest.approx(reported, abs=1e-5)
    assert plan.predicted_on == "unseen"
    assert hook_count(loaded.model) == 0


@pytest.mark.parametrize("search", SEARCHES)
def test_protection_holds(search: str, loaded: Any, cache: Path, report: Any) -> None:
    options = _options(search, protect=("first", "attention:2"))
    plan = _choose(report, loaded, cache, {"attention": 1, "mlp": 2}, options)
    assert sorted(_names(plan)) == [(1, "attention"), (1, "mlp"), (2, "mlp")]
    assert plan.budget["protect"] == "first, attention:2"
    with raises(PlanError, "too-many", 2, 1):
        _choose(report, loaded, cache, {"attention": 2}, options)
    with raises(PlanError, "too-many", 2, 1):
        _choose(report, loaded, cache, {"block": 2}, _options(search, protect=("first", "mlp:2")))


@pytest.mark.parametrize("search", SEARCHES)
def test_nothing_drops_everything(search: str, loaded: Any, cache: Path, report: Any) -> None:
    for counts in ({"attention": 3, "mlp": 3}, {"joint": 6}, {"block": 3}):
        with pytest.raises(PlanError):
            _choose(report, loaded, cache, counts, _options(search))
    plan = _choose(report, loaded, cache, {"joint": 5}, _options(search))
    assert len(set(_names(plan))) == 5


@pytest.mark.parametrize("search", SEARCHES)
def test_everything_is_dropped_where_it_is_allowed(
    search: str, loaded: Any, cache: Path, report: Any
) -> None:
    everything = {(layer, kind) for layer in range(3) for kind in ("attention", "mlp")}
    for counts in ({"attention": 3, "mlp": 3}, {"joint": 6}):
        plan = _choose(report, loaded, cache, counts, _options(search), allow_all=True)
        assert set(_names(plan)) == everything
    if search == "greedy":
        whole = _kl(loaded, cache, report, everything, "reported")
        assert plan.predicted["kl"] == pytest.approx(whole, abs=1e-5)  # float32 sums
    kept = _options(search, protect=("mlp:0",))
    with raises(PlanError, "too-many", 6, 5):
        _choose(report, loaded, cache, {"joint": 6}, kept, allow_all=True)


def test_blocks_are_chosen_whole(loaded: Any, cache: Path, report: Any) -> None:
    plan = _choose(report, loaded, cache, {"block": 1}, _options("greedy"))
    assert [deletion.kind for deletion in plan.deletions] == ["block"]
    assert plan.predicted["kl"] > 0


def test_the_scores_of_another_model(cache: Path, report: Any, loaded: Any) -> None:
    other = tiny_loaded("llama")
    object.__setattr__(other, "ref", loaded.ref.model_copy(update={"sha256": "f" * 64}))
    with raises(PlanError, "another-model", "ffffffffffff"):
        _choose(report, other, cache, {"joint": 1}, _options("greedy"))


def test_a_text_that_has_changed(cache: Path, report: Any, loaded: Any) -> None:
    calibration = report.calibration.model_copy(update={"sha256": "f" * 64})
    changed = report.model_copy(update={"calibration": calibration})
    with raises(CalibrationError, "text-changed"):
        _choose(changed, loaded, cache, {"joint": 1}, _options("greedy"))
    plan = _choose(changed, loaded, cache, {"joint": 1}, _options("greedy"), calibration=("self",))
    assert len(plan.deletions) == 1  # Named by the user, it may be any.


def test_a_model_without_next_tokens(cache: Path) -> None:
    from exporter.score import score_on
    from tests.tiny_models import random_text

    encoder = tiny_loaded("bert")
    report = score_on(encoder, random_text(4, 16))
    plan = _choose(report, encoder, cache, {"attention": 1}, _options("one-shot"))
    assert plan.predicted == {}


def test_one_shot_loads_nothing(report: Any, tmp_path: Path) -> None:
    def load() -> Any:
        raise AssertionError

    plan = Planner(
        report, load, Budget(attention=1), PlanSettings(), work=tmp_path
    ).plan().plan  # fmt: skip
    assert plan.budget == {"attention": 1}


def _written(report: Any, folder: Path, source: str) -> Path:
    model = report.model.model_copy(update={"source": source})
    return Path(report.model_copy(update={"model": model}).write(folder / "importance.json"))


def test_the_command_searches(
    tmp_path: Path, loaded: Any, cache: Path, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:

    lines: list[str] = []

    def load(source: str, **_: Any) -> Any:
        lines.append(source)
        return loaded

    monkeypatch.setattr("exporter.choose.budgets.making.load_model", load)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / "unused"))
    scores = _written(report, tmp_path, "the-model")
    call = ["plan", str(scores), "-o", str(tmp_path / "plan.json"), "--drop-attn", "1"]
    (tmp_path / "few.yaml").write_text("search_tokens: 64\n")
    call += ["--search", "greedy", "--config", str(tmp_path / "few.yaml"), "--protect", "last"]
    call += ["--calibration", "self", "-q"]
    assert cli.run(call) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["budget"]["search"] == "greedy"
    assert plan["predicted"]["kl"] > 0
    assert not (tmp_path / ".depthcut").exists()
    assert cli.run([*call, "--model", "mine"]) == 0
    assert lines == ["the-model", "mine"]
    assert cli.run([*call[:-3], "--objective", "rank"]) == 2


def test_scores_fetch_no_model_that_the_user_did_not_name(
    tmp_path: Path, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may have written the scores; a hub id on the command line is asked for."""
    flags: list[bool] = []

    def fetch(*_: Any, **__: Any) -> str:
        from huggingface_hub import constants

        flags.append(not constants.HF_HUB_OFFLINE)
        raise OSError("not here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    scores = _written(report, tmp_path, "owner/name")
    call = ["plan", str(scores), "-o", str(tmp_path / "plan.json"), "--drop-attn", "1"]
    call += ["--search", "greedy", "-q"]
    assert cli.run(call) == 2
    assert cli.run([*call, "--model", "owner/name"]) == 2
    assert flags == [False, True]


def test_an_interrupted_command_leaves_its_journal(
    tmp_path: Path, loaded: Any, cache: Path, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "damages.jsonl"

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("exporter.choose.budgets.search.Search._trimmed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _choose(report, loaded, cache, {"joint": 2}, _options("greedy"), work=tmp_path)
    lines = journal.read_text().splitlines()
    assert len(lines) > 6
    _choose(report, loaded, cache, {"joint": 2}, _options("greedy"), work=tmp_path)
    assert journal.read_text().splitlines() == lines  # Greedy has nothing left to measure.


@pytest.mark.parametrize("search", ["one-shot", "greedy"])
@pytest.mark.parametrize("server", ["llama.cpp", "vllm"])
def test_what_a_runtime_needs_stays(
    report: Any, loaded: Any, cache: Path, search: Any, server: Any
) -> None:
    counts = {"attention": 2}
    plan = _choose(report, loaded, cache, counts, _options(search), server=server)
    assert {deletion.layer for deletion in plan.deletions} == {1, 2}
    assert plan.budget["for"] == server
    with pytest.raises(PlanError):
        _choose(report, loaded, cache, {"attention": 3}, _options(search), server=server)
    free = _choose(report, loaded, cache, {"attention": 3}, _options(search))
    assert len(free.deletions) == 3


def test_whole_blocks_go_everywhere(report: Any, loaded: Any, cache: Path) -> None:
    plan = _choose(report, loaded, cache, {"block": 2}, _options("one-shot"), server="vllm")
    assert (
        plan.deletions
        == _choose(report, loaded, cache, {"block": 2}, _options("one-shot")).deletions
    )
