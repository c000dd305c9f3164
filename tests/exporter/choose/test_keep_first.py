"""A plan of an early exit: the first layers stay, whatever the scores say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter import cli as command_line
from exporter.errors import OptionError, PlanError, UsageError
from tests.made_reports import full_importance
from tests.raising import ends_in


@pytest.fixture
def call(tmp_path: Path) -> list[str]:
    scores = full_importance(layers=4).write(tmp_path / "importance.json")
    return ["plan", str(scores), "-o", str(tmp_path / "plan.json"), "-q"]


def test_all_behind_the_first_layers_goes_the_last_first(call: list[str], tmp_path: Path) -> None:
    assert command_line.run([*call, "--keep-first", "2"]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [(deletion["layer"], deletion["kind"]) for deletion in plan["deletions"]] == [
        (3, "block"),
        (2, "block"),
    ]
    assert plan["budget"]["keep_first"] == 2


@pytest.mark.parametrize("number", ["4", "5"])
def test_a_model_with_no_more_layers(call: list[str], tmp_path: Path, number: str) -> None:
    with ends_in(PlanError, "nothing-to-drop", number, 4):
        assert command_line.run([*call, "--keep-first", number]) == 2
    assert not (tmp_path / "plan.json").exists()
    assert command_line.run([*call, "--keep-first", "3"]) == 0


@pytest.mark.parametrize(
    ("others", "kind", "code", "field"),
    [
        (["--drop-attn", "1"], OptionError, "", "--drop-attn"),
        (["--drop-block", "1"], OptionError, "", "--drop-block"),
        (["--parameters", "10%"], OptionError, "", "--parameters"),
        (["--fits", "8GB"], OptionError, "", "--fits"),
        (["--faster", "1.2x"], OptionError, "", "--faster"),
        (["--at-most", "5%"], OptionError, "", "--at-most"),
        (["--search", "greedy"], UsageError, "nothing-to-search", "--search"),
        (["--protect", "last"], PlanError, "protected", "--protect"),
    ],
)
def test_what_contradicts_it(
    call: list[str], tmp_path: Path, others: list[str], kind: type, code: str, field: str
) -> None:
    with ends_in(kind, code, "--keep-first", field):
        assert command_line.run([*call, "--keep-first", "2", *others]) == 2
    assert not (tmp_path / "plan.json").exists()


def test_what_it_drops_may_be_other_than_what_stays(call: list[str]) -> None:
    assert command_line.run([*call, "--keep-first", "2", "--protect", "first"]) == 0
