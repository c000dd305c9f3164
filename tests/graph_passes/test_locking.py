"""One writer a target; a killed one holds nothing, and what it recorded is checked."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from graph_passes.errors import InterruptedResultError, PreparedFolderError, TargetInUseError
from graph_passes.files import locking
from graph_passes.files.exchange import identity
from graph_passes.files.locking import held, is_free
from graph_passes.files.placing import finish_interrupted, home_of, staging, working
from graph_passes.files.record import RECORD
from tests.killed import contents, owned_by_another, pending, rests

REPOSITORY = Path(locking.__file__).parents[2]
HOLDER = """
import sys
from pathlib import Path
from graph_passes.files.placing import staging

with staging(Path(sys.argv[2])) as stage:
    print("in", flush=True)
    sys.stdin.readline()
    (stage.folder / "m").write_text("theirs")
    stage.place([(stage.folder / "m", stage.target)])
"""


@contextlib.contextmanager
def another_process(target: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that writes the target as soon as it is sent a line."""
    script = tmp_path / "depthcut"
    script.write_text(HOLDER)
    command = [sys.executable, str(script), "prune", str(target)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        try:
            yield process
        finally:
            process.kill()


def elsewhere(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as jobs:
        return jobs.submit(work).result(timeout=60)


def enter(target: Path, wait_s: float = 0.1) -> None:
    with staging(target, wait_s=wait_s):
        pass


def write(target: Path, text: str) -> None:
    with staging(target, wait_s=120) as stage:
        (stage.folder / "m").write_text(text)
        stage.place([(stage.folder / "m", target)])


def test_a_second_process_says_who_is_there_and_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out" / "m"
    with another_process(target, tmp_path) as process:
        begin = time.monotonic()
        with pytest.raises(TargetInUseError) as caught:
            enter(target)
        assert time.monotonic() - begin < 10
        for item in (str(process.pid), "depthcut prune", str(target)):
            assert item in caught.value.message
        enter(target.with_name("other"))  # another target of the same folder
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    assert target.read_text() == "theirs"
    assert rests(tmp_path) == []


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out" / "m"
    with another_process(target, tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    assert (home_of(target) / "lock").exists()
    assert is_free(home_of(target))
    enter(target, wait_s=0)
    assert not (tmp_path / "out").exists() or rests(tmp_path) == []


def test_a_block_within_a_block_is_the_same_writers(tmp_path: Path) -> None:
    target = tmp_path / "m"
    with working(target) as kept:
        kept.mkdir()
        (kept / "journal").write_text("so far")
        enter(target)
        with pytest.raises(TargetInUseError):
            elsewhere(lambda: enter(target))
        assert kept.exists()
        assert not is_free(home_of(target))
    elsewhere(lambda: enter(target))
    assert rests(tmp_path) == []


def test_two_names_of_a_target_have_one_lock(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with staging(tmp_path / "real" / "m"), pytest.raises(TargetInUseError):
        elsewhere(lambda: enter(tmp_path / "link" / ".." / "link" / "m"))


STRANGE = [
    b"", b"{", b"[" * 100_000, b"null", b"[]", b"\xff\xfe", b'{"process": "x"}',
    b'{"process": 1, "host": "h\\u001b[31m\\n::error ::x", "command": "c\\r\\u001b]0;x\\u0007"}',
    json.dumps({"process": 10**400, "host": "h" * 10_000, "command": "c" * 10_000}).encode(),
    b'{"process": 2, "host": {"a": "\\u202e"}, "command": ["\\u2028::error ::x"]}',
    b'{"process": 1e308, "host": "h", "command": "c"}',
    b'{"process": true, "host": 1, "command": 2}',
    b'{"process": 1e999, "host": "h", "command": "c"}',
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(STRANGE)))
def test_what_a_stranger_wrote_into_a_lock_is_told_safely(tmp_path: Path, number: int) -> None:
    home = home_of(tmp_path / "m")
    home.mkdir(parents=True)
    (home / "lock").write_bytes(STRANGE[number])
    with (home / "lock").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(TargetInUseError) as caught, held(home, tmp_path / "m", wait_s=0):
            pass
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 600 + len(str(tmp_path))
    assert (home / "lock").read_bytes() == STRANGE[number]
    enter(tmp_path / "m")
    assert rests(tmp_path) == []


OTHERS: dict[str, Callable[[Path], object]] = {
    "a link to a file": lambda path: path.symlink_to(path.parents[3] / "elsewhere" / "file"),
    "a link to a folder": lambda path: path.symlink_to(path.parents[3] / "elsewhere"),
    "a link to nowhere": lambda path: path.symlink_to(path.parents[3] / "nowhere"),
    "a link to a device": lambda path: path.symlink_to("/dev/null"),
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a file": lambda path: path.write_text("precious"),
}


PLACES = [
    (place, kind)
    for place in ("results/m/lock", "", "results", "results/m")
    for kind in OTHERS
    if kind != ("a file" if place.endswith("lock") else "a folder")
] + [("results/m/changing.json", "a folder")]


@pytest.mark.parametrize(("place", "kind"), PLACES)
def test_what_is_not_ours_in_a_folder_of_ours_is_refused_and_not_followed(
    tmp_path: Path, place: str, kind: str
) -> None:
    (tmp_path / "elsewhere" / "results" / "m").mkdir(parents=True)
    (tmp_path / "elsewhere" / "m").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("precious")
    out = tmp_path / "out"
    there = out / ".depthcut" / place
    there.parent.mkdir(parents=True)
    OTHERS[kind](there)
    before, names = contents(tmp_path), sorted(tmp_path.rglob("*"))
    with pytest.raises(PreparedFolderError):
        enter(out / "m")
    assert contents(tmp_path) == before
    assert sorted(tmp_path.rglob("*")) == names
    if there.parent.name == "m":
        enter(out / "other")  # another target is not held up by it


def test_a_lock_that_was_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it the run before ends."""
    calls, flock = [], fcntl.flock

    def late(handle: int, mode: int) -> None:
        if not calls:
            (home_of(tmp_path / "m") / "lock").unlink()
        calls.append(mode)
        flock(handle, mode)

    monkeypatch.setattr(fcntl, "flock", late)
    with staging(tmp_path / "m"), pytest.raises(TargetInUseError):
        elsewhere(lambda: enter(tmp_path / "m", wait_s=0))
    assert len(calls) == 3


def test_a_folder_that_comes_and_goes_while_it_is_made_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was there for ``mkdir``, and is gone when ``mkdir`` looks whether it is a folder."""
    calls, mkdir = [], os.mkdir

    def late(path: Path, *arguments: Any) -> None:
        if path == home_of(tmp_path / "m") and not calls:
            calls.append(path)
            raise FileExistsError
        mkdir(path, *arguments)

    monkeypatch.setattr(os, "mkdir", late)
    write(tmp_path / "m", "mine")
    assert len(calls) == 1
    assert (tmp_path / "m").read_text() == "mine"
    assert rests(tmp_path) == []


def test_anothers_lock_stays_when_the_folder_was_removed_meanwhile(tmp_path: Path) -> None:
    target, inside, over = tmp_path / "m", threading.Event(), threading.Event()

    def other() -> bool:
        with staging(target, wait_s=60):
            inside.set()
            over.wait(60)
            return not is_free(home_of(target))

    with ThreadPoolExecutor(1) as jobs:
        with staging(target):
            shutil.rmtree(tmp_path / ".depthcut")
            job = jobs.submit(other)
            assert inside.wait(60)
        assert (home_of(target) / "lock").exists()
        over.set()
        assert job.result(timeout=60)
    assert rests(tmp_path) == []


def test_many_at_once_take_turns(tmp_path: Path) -> None:
    """The folder of ours comes and goes between them."""
    target, inside = tmp_path / "new" / "m", []

    def write(number: int) -> None:
        with staging(target, wait_s=120) as stage:
            inside.append(number)
            assert len(inside) == 1
            (stage.folder / "m").write_text(str(number))
            stage.place([(stage.folder / "m", target)])
            inside.remove(number)

    with ThreadPoolExecutor(8) as jobs:
        list(jobs.map(write, range(40)))
    assert [path.name for path in target.parent.iterdir()] == ["m"]


def test_a_block_that_made_nothing_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for target in (tmp_path / "new" / "deep" / "m", tmp_path / "mine" / "m"):
        with pytest.raises(RuntimeError), staging(target):
            raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert not any((tmp_path / "mine").iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_is_written_and_a_broken_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def without(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", without)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            enter(tmp_path / "m")
        assert contents(tmp_path) == {}
        return
    with staging(tmp_path / "m") as stage:
        (stage.folder / "m").write_text("new")
        assert not is_free(stage.home)  # nobody else's rests are cleared where that can't be told
        stage.place([(stage.folder / "m", tmp_path / "m")])
    assert contents(tmp_path) == {"m": b"new"}


# Records of what is about to change

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


def record(home: Path, *removals: dict[str, Any], **changed: Any) -> None:
    """Records a removal, or else a step as depthcut would write it, changed."""
    new = home / "new" / "m"
    there = {"staged": new.relative_to(home.parents[2]).as_posix(), "final": "m"}
    numbers = {"new": identity(new), "old": identity(home.parents[2] / "m")}
    changes = [] if removals else [{**there, **numbers, **changed}]
    (home / RECORD).write_text(json.dumps({"changes": changes, "removals": removals}))


def finish(tmp_path: Path, *, refused: bool = True) -> None:
    """A reader comes, who refuses what he finds and leaves it, or carries it out."""
    before = contents(tmp_path)
    if refused:
        with pytest.raises(InterruptedResultError):
            finish_interrupted(tmp_path / "out" / "m")
        assert contents(tmp_path) == before
    else:
        finish_interrupted(tmp_path / "out" / "m")


def test_a_true_record_is_carried_out(home: Path, tmp_path: Path) -> None:
    """The twin of all that follows: what is forged there is right here."""
    record(home)
    finish(tmp_path, refused=False)
    assert (tmp_path / "out" / "m").read_text() == "new"
    assert not home.exists()


@pytest.mark.parametrize("whose", ["changing.json", "m", "results", ".depthcut"])
def test_a_record_of_another_users_is_not_followed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """In a folder that all may write to, such as /tmp, he can know the numbers of our files."""
    before = contents(tmp_path)
    record(home)
    (theirs,) = (path for path in (home / RECORD, home, *home.parents[:2]) if path.name == whose)
    with monkeypatch.context() as patch:
        owned_by_another(patch, theirs)
        with pytest.raises(PreparedFolderError):
            finish_interrupted(tmp_path / "out" / "m")
    assert contents(tmp_path) == before
    with monkeypatch.context() as patch:
        owned_by_another(patch, theirs, tmp_path / "out")  # he can do there what he likes
        finish(tmp_path, refused=False)
    assert (tmp_path / "out" / "m").read_text() == "new"


def test_nothing_is_made_in_another_users_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(tmp_path)
    owned_by_another(monkeypatch, home.parent)
    with pytest.raises(PreparedFolderError):
        enter(tmp_path / "out" / "m")
    enter(tmp_path / "elsewhere" / "m")
    assert contents(tmp_path) == before


VICTIM, MINE, HIS = ("/{}/victim", "mine", "/{}/elsewhere/victim")
FORGED: dict[str, dict[str, Any]] = {
    "above": {"final": "../victim", "old": VICTIM},
    "absolute": {"final": VICTIM, "old": VICTIM},
    "through a link": {"final": "link/victim", "old": HIS},
    "dots within": {"final": "a/../../victim", "old": VICTIM},
    "nothing": {"final": ""},
    "itself": {"final": "."},
    "a zero": {"final": "m\0"},
    "half a letter": {"final": "m\ud800"},
    "staged above": {"staged": "../victim", "new": VICTIM},
    "staged absolute": {"staged": VICTIM, "new": VICTIM},
    "staged is the user's": {"staged": "mine", "new": MINE},
    "staged through a link": {"staged": ".depthcut/l/victim", "new": VICTIM},
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
"""Steps that name something else, with the right numbers (those of a path) of what they name."""


def filled(step: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A forged step in a folder."""
    result = {}
    for key, value in step.items():
        if isinstance(value, str):
            value = value.replace("/{}", str(tmp_path))
        numbers = key in ("new", "old") and isinstance(value, str)
        result[key] = identity(tmp_path / "out" / value) if numbers else value
    return result


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_step_changes_nothing(home: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out" / "elsewhere").mkdir()
    (tmp_path / "out" / ".depthcut" / "l").symlink_to(tmp_path)
    record(home, **filled(FORGED[name], tmp_path))
    finish(tmp_path)
    before = contents(tmp_path)
    write(tmp_path / "out" / "m", "written anew")
    assert contents(tmp_path) == {**before, "out/m": b"written anew"}
    assert pending(tmp_path) == []


@pytest.mark.parametrize(("final", "old"), [
    ("../victim", VICTIM), ("link/victim", HIS), ("a/../../victim", VICTIM), (VICTIM, VICTIM),
    ("mine", NUMBERS),
])  # fmt: skip
def test_a_forged_removal_removes_nothing(
    home: Path, tmp_path: Path, final: str, old: object
) -> None:
    before = contents(tmp_path)
    record(home, filled({"final": final, "old": old}, tmp_path))
    finish(tmp_path, refused=final != "mine")  # which is not as it was, so it stays
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", "7", '"changes"', "{}", '{"changes": []}', '{"removals": []}',
    '{"changes": {}, "removals": 7}', '{"changes": [7], "removals": []}',
    '{"changes": [{}], "removals": []}', '{"changes": [], "removals": [{"final": "m"}]}',
    "[" * 200_000, '{"changes": ' + "[" * 100_000, '{"changes": [' + "9" * 5000 + "]}",
    '{"changes": [{"final": "m", "staged": ".depthcut/x", "new": [1e999], "old": null}], '
    '"removals": []}',
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "a terabyte",
])  # fmt: skip
def test_what_is_no_record_is_refused(home: Path, tmp_path: Path, text: str) -> None:
    (home / RECORD).write_text(text)
    if text == "a terabyte":
        os.truncate(home / RECORD, 1 << 40)
    finish(tmp_path)


def test_a_record_of_no_steps_is_none(home: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    (home / RECORD).write_text('{"changes": [], "removals": []}')
    finish(tmp_path, refused=False)
    assert contents(tmp_path) == before
    assert not home.exists()


def test_a_removal_whose_emptied_folder_has_gone_is_done(home: Path, tmp_path: Path) -> None:
    """A process was killed after it removed the folder, before it removed the record."""
    record(home, {"final": "emptied/file", "old": [1, 2, 3]})
    finish(tmp_path, refused=False)
    assert not home.exists()
