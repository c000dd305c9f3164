"""Records of what is about to change: strangers' input until every name in them is checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from graph_passes.errors import InterruptedResultError, PreparedFolderError
from graph_passes.files.exchange import identity
from graph_passes.files.placing import finish_interrupted, home_of, staging
from graph_passes.files.record import RECORD, Change, ChangeRecord, Removal, read_record
from tests.killed import contents, owned_by_another, pending

NUMBERS = [1, 2, 3]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder of ours for ``out/m``, with a staged file; beside ``out`` lies a victim."""
    home = home_of(tmp_path / "out" / "m")
    (home / "new").mkdir(parents=True)
    (home / "new" / "m").write_text("new")
    for place in ("out/m", "out/mine", "victim", "elsewhere/victim"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("precious")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    return home


def staged(home: Path) -> str:
    return (home / "new" / "m").relative_to(home.parents[2]).as_posix()


def change(home: Path, **changed: Any) -> dict[str, Any]:
    """A step as depthcut would write it, changed."""
    there = {"staged": staged(home), "final": "m", "new": identity(home / "new" / "m")}
    return {**there, "old": identity(home.parents[2] / "m"), **changed}


def write(home: Path, told: Any) -> None:
    text = told if isinstance(told, str) else json.dumps(told)
    (home / "changing.json").write_text(text)


def test_what_is_written_is_read(home: Path) -> None:
    root = home.parents[2]
    record = ChangeRecord(
        [Change(home / "new" / "m", root / "m", NUMBERS, None),
         Change(home / "new" / "below" / "n", root / "below" / "n", [1], [2])],
        [Removal(root / "gone", NUMBERS), Removal(root / "never", None)],
    )  # fmt: skip
    record.write(home)
    assert read_record(home) == record
    assert sorted(path.name for path in home.iterdir()) == ["changing.json", "new"]


def test_a_report_in_another_folder_is_named_from_the_root_on(home: Path, tmp_path: Path) -> None:
    report = tmp_path / "reports" / "r"
    made = home_of(report) / "new" / "r"
    record = ChangeRecord([Change(made, report, NUMBERS, NUMBERS)], [])
    record.write(home)
    assert read_record(home) == record


def test_a_true_record_is_carried_out(home: Path) -> None:
    """The twin of all that follows: what is forged there is right here."""
    write(home, {"changes": [change(home)], "removals": []})
    finish_interrupted(home.parents[2] / "m")
    assert (home.parents[2] / "m").read_text() == "new"
    assert not home.exists()


@pytest.mark.parametrize("whose", ["changing.json", "m", "results", ".depthcut"])
def test_a_record_of_another_users_is_not_followed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """In a folder that all may write to, such as /tmp, he can know the numbers of our files."""
    before = contents(tmp_path)
    write(home, {"changes": [change(home)], "removals": []})
    (theirs,) = (path for path in (home / RECORD, home, *home.parents[:2]) if path.name == whose)
    with monkeypatch.context() as patch:
        owned_by_another(patch, theirs)
        with pytest.raises(PreparedFolderError):
            finish_interrupted(tmp_path / "out" / "m")
    assert contents(tmp_path) == before
    with monkeypatch.context() as patch:
        owned_by_another(patch, theirs, tmp_path / "out")  # he can do there what he likes
        finish_interrupted(tmp_path / "out" / "m")
    assert (tmp_path / "out" / "m").read_text() == "new"


def test_nothing_is_made_in_another_users_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(tmp_path)
    owned_by_another(monkeypatch, home.parent)
    with pytest.raises(PreparedFolderError), staging(tmp_path / "out" / "m"):
        pass
    with staging(tmp_path / "elsewhere" / "m"):
        pass
    assert contents(tmp_path) == before


FORGED = [
    "above", "absolute", "through a link", "dots within", "nothing", "itself", "a zero",
    "half a letter", "staged above", "staged absolute", "staged is the user's",
    "staged through a link", "wrong new", "wrong old", "none is there", "text", "a list",
    "numbers in words", "two numbers", "truths", "no numbers", "fractions", "a folder in the way",
    "far too long", "a zero in a folder",
]  # fmt: skip


def forged(home: Path) -> dict[str, dict[str, Any]]:
    """Steps that name something else, with the right numbers of what they name."""
    root, outside = home.parents[2], home.parents[3]
    victim, mine = outside / "victim", root / "mine"
    known = {"old": identity(victim)}
    return {
        "above": {"final": "../victim", **known},
        "absolute": {"final": str(victim), **known},
        "through a link": {"final": "link/victim", "old": identity(outside / "elsewhere/victim")},
        "dots within": {"final": "a/../../victim", **known},
        "nothing": {"final": ""},
        "itself": {"final": "."},
        "a zero": {"final": "m\0"},
        "half a letter": {"final": "m\ud800"},
        "staged above": {"staged": "../victim", "new": identity(victim)},
        "staged absolute": {"staged": str(victim), "new": identity(victim)},
        "staged is the user's": {"staged": "mine", "new": identity(mine)},
        "staged through a link": {"staged": ".depthcut/l/victim", "new": identity(victim)},
        "wrong new": {"new": NUMBERS},
        "wrong old": {"old": NUMBERS, "final": "mine"},
        "none is there": {"old": None, "final": "mine"},
        "text": {"final": 7},
        "a list": {"staged": ["m"]},
        "numbers in words": {"new": ["1", "2", "3"]},
        "two numbers": {"new": [1, 2]},
        "truths": {"new": [True, True, True]},
        "no numbers": {"new": None},
        "fractions": {"new": [1.5, 2, 3]},
        "a folder in the way": {"final": "elsewhere", "old": None},
        "far too long": {"final": "x" * 5000, "old": None},
        "a zero in a folder": {"staged": "/a\0b/.depthcut/m", "final": "/a\0b/m"},
    }


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_step_changes_nothing(home: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out" / "elsewhere").mkdir()
    (tmp_path / "out" / ".depthcut" / "l").symlink_to(tmp_path)
    before = contents(tmp_path)
    write(home, {"changes": [change(home, **forged(home)[name])], "removals": []})
    with pytest.raises(InterruptedResultError):
        finish_interrupted(tmp_path / "out" / "m")
    assert contents(tmp_path) == before
    with staging(tmp_path / "out" / "m") as stage:
        (stage.folder / "m").write_text("written anew")
        stage.place([(stage.folder / "m", tmp_path / "out" / "m")])
    assert contents(tmp_path) == {**before, "out/m": b"written anew"}
    assert pending(tmp_path) == []


@pytest.mark.parametrize("name", ["../victim", "link/victim", "a/../../victim", "absolute", "mine"])
def test_a_forged_removal_removes_nothing(home: Path, tmp_path: Path, name: str) -> None:
    victim = {"link/victim": tmp_path / "elsewhere" / "victim"}.get(name, tmp_path / "victim")
    old = NUMBERS if name == "mine" else identity(victim)
    before = contents(tmp_path)
    step = {"final": str(victim) if name == "absolute" else name, "old": old}
    write(home, {"changes": [], "removals": [step]})
    if name == "mine":
        finish_interrupted(tmp_path / "out" / "m")  # it is not as it was, so it stays
    else:
        with pytest.raises(InterruptedResultError):
            finish_interrupted(tmp_path / "out" / "m")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("told", [
    "", "{", "[]", "null", "7", '"changes"', "{}", '{"changes": []}', '{"removals": []}',
    '{"changes": {}, "removals": 7}', '{"changes": [7], "removals": []}',
    '{"changes": [{}], "removals": []}', '{"changes": [], "removals": [{"final": "m"}]}',
    "[" * 200_000, '{"changes": ' + "[" * 100_000, '{"changes": [' + "9" * 5000 + "]}",
    '{"changes": [{"final": "m", "staged": ".depthcut/x", "new": [1e999], "old": null}], '
    '"removals": []}',
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
])  # fmt: skip
def test_what_is_no_record_is_refused(home: Path, tmp_path: Path, told: str) -> None:
    before = contents(tmp_path)
    write(home, told)
    with pytest.raises(InterruptedResultError):
        finish_interrupted(tmp_path / "out" / "m")
    assert contents(tmp_path) == before


def test_a_huge_record_is_not_read(home: Path, tmp_path: Path) -> None:
    write(home, "{}")
    os.truncate(home / "changing.json", 1 << 40)
    with pytest.raises(InterruptedResultError):
        finish_interrupted(tmp_path / "out" / "m")


def test_a_record_of_no_steps_is_none(home: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    write(home, {"changes": [], "removals": []})
    finish_interrupted(tmp_path / "out" / "m")
    assert contents(tmp_path) == before
    assert not home.exists()
