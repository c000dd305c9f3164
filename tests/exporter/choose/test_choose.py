"""From scores to a plan on models of three layers: by scores, by damage, and by right answers."""

from __future__ import annotations

import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from exporter import cli
from exporter.artifacts import ImportanceReport
from exporter.choose.budgets.budget import Budget, SearchOptions
from exporter.errors import CalibrationError, PlanError
from tests.exporter.made_plans import made_planner, names_of
from tests.raising import raises
from tests.reading import in_file
from tests.tiny_models import hook_count, skipped, tiny_loaded

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.choose.budgets.inputs import parted  # noqa: E402
from exporter.models.texts.calibration import text_of_report  # noqa: E402
from exporter.score.options import ScoreOptions  # noqa: E402
from exporter.score.scoring import score  # noqa: E402

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
        "exporter.choose.budgets.planner.load_model",
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
