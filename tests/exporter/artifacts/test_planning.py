"""What is chosen, and what is refused. No PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.artifacts import ImportanceReport, PruningPlan
from exporter.artifacts.plans import parse_drops, plan_drop, read_plan, validate_plan
from exporter.errors import ArtifactError, PlanError, UsageError
from tests.made_reports import importance_of
from tests.raising import raises

ATTENTION = [0.9, 0.2, 0.1, 0.2, 0.5]
MLP = [0.8, 0.15, 0.3, 0.4, 0.6]
BLOCK = [0.95, 0.3, 0.35, 0.25, 0.7]


def _report(
    attention: list[float] = ATTENTION, mlp: list[float] = MLP, block: list[float] = BLOCK
) -> ImportanceReport:
    return importance_of({"attention": attention, "mlp": mlp, "block": block})


def test_the_lowest_scores_are_chosen_on_their_text() -> None:
    report = _report()
    assert plan_drop(report, attention=1).roles == {"chosen": [report.calibration]}
    none = report.calibration.model_copy(update={"samples": 0})
    without_text = report.model_copy(update={"calibration": none})
    assert plan_drop(without_text, attention=1).roles == {}


def _chosen(plan: PruningPlan) -> list[tuple[str, int]]:
    return [(deletion.kind, deletion.layer) for deletion in plan.deletions]


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ({"attention": 3}, [("attention", 2), ("attention", 1), ("attention", 3)]),
        ({"mlp": 2}, [("mlp", 1), ("mlp", 2)]),
        ({"block": 2}, [("block", 3), ("block", 1)]),
        ({"joint": 3}, [("attention", 2), ("mlp", 1), ("attention", 1)]),
        ({"attention": 1, "mlp": 1}, [("attention", 2), ("mlp", 1)]),
        ({"attention": 1, "block": 1}, [("attention", 2), ("block", 3)]),
    ],
)
def test_the_lowest_scores_go_first(asked: dict[str, int], chosen: list[tuple[str, int]]) -> None:
    plan = plan_drop(_report(), **asked, importance_sha256="ab")
    assert _chosen(plan) == chosen
    assert plan.budget == asked
    assert plan.importance_sha256 == "ab"


@given(st.lists(st.floats(0, 2), min_size=5, max_size=5), st.integers(1, 5))
def test_nothing_kept_scores_lower_than_anything_dropped(scores: list[float], number: int) -> None:
    plan = plan_drop(_report(attention=scores), attention=number)
    dropped = {deletion.layer for deletion in plan.deletions}
    assert len(dropped) == number
    kept = set(range(5)) - dropped
    assert all(scores[a] <= scores[b] for a in dropped for b in kept)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, ("nothing-asked",)),
        ({"attention": -1}, ("number-out-of-range", -1)),
        ({"attention": 6}, ("too-few-scored", 6, 5)),
        ({"block": 6}, ("too-few-scored", 6, 5)),
        ({"joint": 11}, ("too-few-scored", 11, 10)),
        ({"joint": 10}, ("nothing-left",)),
        ({"block": 5}, ("nothing-left",)),
        ({"attention": 5, "mlp": 5}, ("nothing-left",)),
        ({"attention": 1, "joint": 1}, ("joint-and-kinds",)),
        ({"attention": 3, "block": 1}, ("dropped-twice", "attention 3")),
    ],
)
def test_impossible_budgets(asked: dict[str, int], told: tuple[Any, ...]) -> None:
    with raises(PlanError, *told):
        plan_drop(_report(), **asked)


@pytest.mark.parametrize("asked", [{"joint": 10}, {"block": 5}, {"attention": 5, "mlp": 5}])
def test_everything_may_go_where_it_is_allowed(asked: dict[str, int]) -> None:
    plan = plan_drop(_report(), **asked, allow_all=True)
    assert len(plan.deletions) == sum(asked.values())
    with raises(PlanError, "nothing-left", "--allow-empty"):
        plan_drop(_report(), **asked)


def test_a_score_that_is_not_a_number_is_refused() -> None:
    with raises(PlanError, "not-finite", "attention 1"):
        plan_drop(_report(attention=[0.1, float("nan"), 0.3, 0.4, 0.5]), attention=1)


def test_drops_by_hand_keep_their_order() -> None:
    plan = parse_drops(["attention:25,7", "mlp:3", "block:10-12"])
    assert _chosen(plan) == [
        ("attention", 25), ("attention", 7), ("mlp", 3), ("block", 10), ("block", 11),
        ("block", 12),
    ]  # fmt: skip
    assert plan.importance_sha256 is None


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ([], ("drops-nothing",)),
        (["mlp:3,3"], ("dropped-twice", "mlp 3")),
        (["mlp:3", "block:2-4"], ("dropped-twice", "mlp 3")),
    ],
)
def test_drops_that_contradict_themselves(texts: list[str], told: tuple[Any, ...]) -> None:
    with raises(PlanError, *told):
        parse_drops(texts)


@pytest.mark.parametrize(
    ("texts", "code"),
    [
        (["attention"], "malformed-drop"),
        (["attention:"], "malformed-drop"),
        (["attention:1,"], "malformed-drop"),
        (["attention:-1"], "malformed-drop"),
        (["attention:5-3"], "malformed-range"),
        (["attention:0-99999999999"], "malformed-range"),
        (["mlp:3", "attention:x"], "malformed-drop"),
        (["attn:3"], "unknown-kind"),
    ],
)
def test_drops_that_make_no_sense(texts: list[str], code: str) -> None:
    with raises(UsageError, code, texts[-1]) as caught:
        parse_drops(texts)
    assert caught.value.hint


def test_bad_plan_files(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with raises(ArtifactError, "file-missing", path):
        read_plan(path)
    PruningPlan(deletions=[]).write(path)
    with raises(PlanError, "drops-nothing", path):
        read_plan(path)
    broken = '"deletions": [{"layer": -1, "kind": "mlp"}]'
    path.write_text(path.read_text().replace('"deletions": []', broken))
    with raises(ArtifactError, "", "$.deletions[0].layer"):
        read_plan(path)


@pytest.mark.parametrize(
    ("texts", "code", "told"),
    [
        (["attention:5"], "layer-missing", ("attention 5", 0, 4)),
        (["cross_attention:1"], "kind-missing", ("cross_attention",)),
        (["block:0-4"], "nothing-left", ()),
    ],
)
def test_plans_that_do_not_fit_the_model(
    texts: list[str], code: str, told: tuple[Any, ...]
) -> None:
    with raises(PlanError, code, "tiny/model", *told) as caught:
        validate_plan(parse_drops(texts), 5, model="tiny/model")
    assert caught.value.hint
    with raises(PlanError, code, "plan.json"):
        validate_plan(parse_drops(texts), 5, path=Path("plan.json"))
    if "block" not in texts[0]:
        with raises(PlanError, code, "tiny/model", *told):
            validate_plan(parse_drops(texts), 5, model="tiny/model", allow_all=True)


def test_a_plan_that_drops_everything_where_that_is_allowed() -> None:
    validate_plan(parse_drops(["block:0-4"]), 5, allow_all=True)
