"""Output folders that were prepared, hold a user's own files, or were left by a killed run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts.store import StageLedger, locked
from exporter.cli import run
from exporter.errors import InterruptedResultError, PreparedFolderError, UsageError
from graph_passes.files.placing import finish_interrupted
from tests.killed import contents, every_kill, pending, rests

USERS = {
    ".env.prod.old": "SECRET=1",
    "env/settings": "kept",
    ".config.backup.old/init.lua": "kept",
    "config/init.lua": "kept",
    ".draft.v2.part": "kept",
    ".only.2024.old": "kept",
    ".report.json.abc.part": "kept",
    ".candidate.abc.old/model.onnx": "kept",
    "candidate.part/notes": "kept",
}
"""What looks like an earlier version's leftovers, and is the user's."""


def write_all(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def record(ledger: StageLedger, stage: str, *names: str, key: str = "", **how: Any) -> str:
    files = dict.fromkeys(names, key)
    return ledger.once(stage, {"asked": key}, lambda folder: write_all(folder, files), **how)


def walk(root: Path, version: str, *, names: tuple[str, ...] = ("one", "below/two")) -> None:
    """A run of two stages, of which one makes a folder with a file of its own version, too."""
    with locked(root):
        ledger = StageLedger(root)
        record(
            ledger,
            "candidate",
            *(f"candidate/{n}" for n in (*names, f"only-{version}")),
            key=version,
        )
        record(ledger, "report", "report.json", key=version, of=("candidate",))
        ledger.publish()


FOREIGN = {"candidate/notes.txt": "mine", "candidate/below/deep/mine": "mine", "mine.txt": "mine"}


def prepared(root: Path, *versions: str) -> Path:
    """A folder with results, and the user's files and links among them."""
    for version in versions:
        walk(root, version)
    write_all(root, FOREIGN)
    (root / "candidate" / "data").symlink_to("/usr")
    (root / "candidate" / "latest").symlink_to("one")
    (root / "candidate" / "broken").symlink_to("nowhere")
    return root


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Copies what `prepared` makes of the old version."""
    made = prepared(tmp_path_factory.mktemp("old") / "old", "old")
    return lambda root: shutil.copytree(made, root, symlinks=True)


def mine(root: Path) -> dict[str, Any]:
    result = contents(root)
    names = (*FOREIGN, "candidate/data", "candidate/latest", "candidate/broken")
    return {name: result.get(name) for name in names}


def test_a_users_files_stay_in_a_folder_that_is_replaced(tmp_path: Path) -> None:
    before = mine(prepared(tmp_path, "old"))
    inode = (tmp_path / "candidate" / "notes.txt").stat().st_ino
    walk(tmp_path, "new")
    assert mine(tmp_path) == before
    assert (tmp_path / "candidate" / "notes.txt").stat().st_ino == inode
    result = contents(tmp_path)
    assert result["candidate/one"] == result["report.json"] == b"new"
    assert "candidate/only-old" not in result
    assert os.listdir(tmp_path / ".depthcut") == ["stages.json"]  # noqa: PTH208
    walk(tmp_path, "new")
    assert contents(tmp_path) == result


@pytest.mark.parametrize("name", ["candidate/one", "candidate/below", "candidate/below/two/mine"])
def test_a_users_file_where_a_new_result_belongs_stops_it(tmp_path: Path, name: str) -> None:
    walk(tmp_path, "old", names=("other",))
    write_all(tmp_path, {name: "mine"})
    before = contents(tmp_path)
    with pytest.raises(UsageError):
        walk(tmp_path, "new")
    assert contents(tmp_path) == before
    (tmp_path / name).rename(tmp_path / "moved")
    walk(tmp_path, "new")
    result = contents(tmp_path)
    assert result["candidate/one"] == result["candidate/below/two"] == b"new"
    assert result["moved"] == b"mine"


@pytest.mark.parametrize("changed", [False, True])
def test_what_no_run_makes_any_more_goes_unless_it_was_changed(
    tmp_path: Path, changed: bool
) -> None:
    for stage, gone in (("extra", None), ("report", "extra")):
        with locked(tmp_path):
            ledger = StageLedger(tmp_path)
            if gone:
                ledger.forget(gone)
            record(ledger, stage, f"{stage}.json")
            ledger.publish()
        if changed:
            (tmp_path / "extra.json").write_text("edited")
    assert (tmp_path / "extra.json").exists() == changed
    assert not StageLedger(tmp_path).has("extra")


def test_an_interrupted_plan_without_replacements_takes_the_earlier_ones_away(
    tmp_path: Path,
) -> None:
    """What an earlier run published and this one's plan has not goes, though the run was killed."""

    def plan(key: str, *names: str, ends: bool = True) -> None:
        with locked(tmp_path):
            ledger = StageLedger(tmp_path)
            record(ledger, "plan", *names, key=key)
            if ends:
                ledger.publish()

    plan("healed", "plan.json", "plan.safetensors")
    plan("plain", "plan.json", ends=False)
    assert (tmp_path / "plan.json").read_text() == "healed"
    assert (tmp_path / "plan.safetensors").read_text() == "healed"
    plan("plain", "plan.json")
    assert (tmp_path / "plan.json").read_text() == "plain"
    assert not (tmp_path / "plan.safetensors").exists()


def test_a_killed_run_leaves_old_or_new_and_what_is_the_users(
    tmp_path: Path, old: Callable[[Path], Path]
) -> None:
    before = contents(old(tmp_path / "old"))
    walk(old(tmp_path / "new"), "new")
    new = contents(tmp_path / "new")
    left = every_kill(lambda step: old(tmp_path / str(step)), lambda root: walk(root, "new"))
    for number, root in enumerate(left):
        raw = contents(root)
        assert raw in (before, new) or pending(root), root
        if number % 2:  # a reader comes first
            finish_interrupted(root / "candidate" / "one")
            assert pending(root) == []
            assert contents(root) in (before, new), root
        walk(root, "new")
        assert contents(root) == new
        assert os.listdir(root / ".depthcut") == ["stages.json"]  # noqa: PTH208
        assert record(StageLedger(root), "candidate", key="new") == "reused"


def test_a_first_run_that_is_killed_leaves_nothing_half(tmp_path: Path) -> None:
    walk(tmp_path / "new", "new")
    new = contents(tmp_path / "new")
    for root in every_kill(lambda step: tmp_path / str(step), lambda root: walk(root, "new")):
        raw = contents(root) if root.exists() else {}
        first = {name: text for name, text in new.items() if name.startswith("candidate")}
        assert raw in ({}, first, new) or pending(root)
        walk(root, "new")
        assert contents(root) == new
        assert rests(root) == [root / ".depthcut"]


def test_what_was_changed_after_a_kill_is_kept_off_readers_until_it_is_made_again(
    tmp_path: Path, old: Callable[[Path], Path]
) -> None:
    met = 0
    for root in every_kill(lambda step: old(tmp_path / str(step)), lambda root: walk(root, "new")):
        if not pending(root):
            continue
        (root / "report.json").write_text("edited by hand")
        before = mine(old(tmp_path / "whole" / str(met)))
        for _ in range(2):
            with pytest.raises(InterruptedResultError):
                finish_interrupted(root / "candidate")
        assert (root / "report.json").read_text() == "edited by hand"
        walk(root, "new")
        finish_interrupted(root / "candidate")
        assert mine(root) == before, root
        assert (root / "report.json").read_text() == "new"
        assert (root / "candidate" / "one").read_text() == "new"
        met += 1
    assert met > 5


# Finding 3: a prepared folder.


def forged(root: Path, names: list[str], sha256: str) -> None:
    stages = {
        f"old {number}": {"key": "k", "files": {name: sha256}, "value": None}
        for number, name in enumerate(names)
    }
    published = dict.fromkeys(names, sha256)
    write_all(root, {
        ".depthcut/stages.json": json.dumps({"stages": stages, "published": published}),
    })  # fmt: skip


@pytest.mark.parametrize("forget", [True, False])
def test_names_that_lead_out_are_no_results_of_ours(tmp_path: Path, forget: bool) -> None:
    victim, root = tmp_path / "victim", tmp_path / "out"
    write_all(tmp_path, {"victim": "precious", "folder/victim": "precious"})
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "folder")
    (root / "leaf").symlink_to(victim)
    before = contents(tmp_path)
    names = ["../victim", str(victim), "link/victim", "leaf", "a/../../victim", ".", "", "a\0b"]
    forged(root, names, hashlib.sha256(b"precious").hexdigest())
    with locked(root):
        ledger = StageLedger(root)
        for stage in (f"old {number}" for number in range(len(names))):
            if forget and ledger.has(stage):
                ledger.forget(stage)
        record(ledger, "report", "report.json", key="made")
        ledger.publish()
        ledger.drop("..", "link", "leaf", "victim")
    assert contents(tmp_path) == {**before, "out/report.json": b"made"}


@pytest.mark.parametrize("target", ["victim", "folder", "nowhere"])
@pytest.mark.parametrize(
    "place",
    ["", "lock", "stages.json", "stages-next.json", "work", "gone", "new", "kept", "changing.json",
     "work/report.json", "work/candidate", "results"],
)  # fmt: skip
def test_links_in_a_prepared_folder_are_refused(tmp_path: Path, place: str, target: str) -> None:
    names = ("victim", "folder/lock", "folder/work/precious")
    write_all(tmp_path, dict.fromkeys(names, "precious"))
    link = tmp_path / "out" / ".depthcut" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / target)
    before = contents(tmp_path)
    with pytest.raises(PreparedFolderError), locked(tmp_path / "out"):
        pass
    assert contents(tmp_path) == before
    assert link.is_symlink()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["lock", "work/pipe", "stages.json"])
def test_a_pipe_in_a_prepared_folder_is_refused_and_never_waited_for(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / ".depthcut" / name).parent.mkdir(parents=True)
    os.mkfifo(tmp_path / ".depthcut" / name)
    with pytest.raises(PreparedFolderError), locked(tmp_path):
        pass


# Finding 5: a user's own files that look like leftovers.


@pytest.mark.parametrize("target", ["home", "home/report", "home/new/report"])
def test_no_name_makes_a_users_file_a_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path / "home", USERS)
    before = contents(tmp_path)
    assert run(["compare", "nope", "nope2", "-o", target]) != 0
    assert contents(tmp_path) == before
    assert not (tmp_path / "home" / "only").exists()
    assert rests(tmp_path) == []
    assert not (tmp_path / "home" / "new").exists()


def test_a_run_that_succeeds_leaves_them_too(tmp_path: Path) -> None:
    write_all(tmp_path, USERS)
    before = contents(tmp_path)
    walk(tmp_path, "new")
    walk(tmp_path, "newer")
    after = contents(tmp_path)
    assert {name: after.get(name) for name in before} == before


def walk_shared(root: Path, version: str, cells: str = "ab") -> None:
    """Runs that have a stage in common: the first one makes it, and the others take it."""
    for cell in cells:
        with locked(root / cell):
            ledger = StageLedger(root / cell)
            names = ("candidate/one", f"candidate/below/{version}")
            shared = root / ".depthcut" / "shared"
            record(ledger, "candidate", *names, key=version, shared=shared)
            ledger.publish()


def test_a_killed_run_leaves_no_half_of_a_shared_stage(tmp_path: Path) -> None:
    walk_shared(tmp_path / "old", "old")

    def old(step: int | str) -> Path:
        return Path(shutil.copytree(tmp_path / "old", tmp_path / str(step)))

    walk_shared(old("new"), "new")
    before, new = contents(tmp_path / "old" / "a"), contents(tmp_path / "new" / "a")
    assert contents(tmp_path / "new" / "b") == new != before
    for root in every_kill(old, lambda root: walk_shared(root, "new")):
        for cell in (root / "a", root / "b"):
            assert contents(cell) in (before, new) or pending(cell)
        walk_shared(root, "new", "a")
        shared = (root / ".depthcut" / "shared").glob("*/.depthcut/stages.json")
        assert len(list(shared)) == 2  # the old version's, and the new one's
        walk_shared(root, "new", "b")
        assert [contents(root / cell) for cell in "ab"] == [new] * 2
