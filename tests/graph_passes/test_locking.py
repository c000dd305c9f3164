"""One writer a target: a second one waits, or says who is there; a killed one holds nothing."""

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

from graph_passes.errors import PreparedFolderError, TargetInUseError
from graph_passes.files import locking
from graph_passes.files.locking import held, is_free
from graph_passes.files.placing import home_of, staging, working
from tests.killed import contents, rests

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


def ended(process: subprocess.Popen[str]) -> int:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.wait(timeout=60)


def test_a_second_process_says_who_is_there_and_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out" / "m"
    with another_process(target, tmp_path) as process:
        begin = time.monotonic()
        with pytest.raises(TargetInUseError) as caught, staging(target, wait_s=0.2):
            pass
        assert time.monotonic() - begin < 10
        for item in (str(process.pid), "depthcut prune", str(target)):
            assert item in caught.value.message
        with staging(target.with_name("other")):  # another target of the same folder
            pass
        assert ended(process) == 0
    assert target.read_text() == "theirs"
    assert rests(tmp_path) == []


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out" / "m"
    with another_process(target, tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    assert (home_of(target) / "lock").exists()
    assert is_free(home_of(target))
    with staging(target, wait_s=0):
        pass
    assert not (tmp_path / "out").exists() or rests(tmp_path) == []


def elsewhere(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as jobs:
        return jobs.submit(work).result(timeout=60)


def enter(target: Path, wait_s: float = 0.1) -> None:
    with staging(target, wait_s=wait_s):
        pass


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


@pytest.mark.parametrize("kind", ["a file", "nowhere", "a folder", "a device"])
def test_a_lock_that_is_a_link_is_refused_and_not_followed(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a file").write_text("precious")
    (tmp_path / "a folder").mkdir()
    home = home_of(tmp_path / "out" / "m")
    home.mkdir(parents=True)
    (home / "lock").symlink_to("/dev/null" if kind == "a device" else tmp_path / kind)
    before = contents(tmp_path)
    with pytest.raises(PreparedFolderError):
        enter(tmp_path / "out" / "m")
    assert contents(tmp_path) == before
    assert not (tmp_path / "nowhere").exists()
    assert (home / "lock").is_symlink()
    enter(tmp_path / "out" / "other")  # another target is not held up by it


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    home = home_of(tmp_path / "m")
    home.mkdir(parents=True)
    os.mkfifo(home / "lock") if kind == "pipe" else (home / "lock").mkdir()
    with pytest.raises(PreparedFolderError):
        enter(tmp_path / "m")
    enter(tmp_path / "other")


@pytest.mark.parametrize("place", [".depthcut", ".depthcut/results", ".depthcut/results/m"])
@pytest.mark.parametrize("kind", ["file", "link", "link to nowhere"])
def test_a_folder_of_ours_that_is_none_is_refused(tmp_path: Path, place: str, kind: str) -> None:
    (tmp_path / "elsewhere" / "results" / "m").mkdir(parents=True)
    (tmp_path / "elsewhere" / "m").mkdir(parents=True)
    out = tmp_path / "out"
    (out / place).parent.mkdir(parents=True)
    if kind == "file":
        (out / place).write_text("precious")
    else:
        (out / place).symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    before = contents(tmp_path)
    result = sorted(tmp_path.rglob("*"))
    with pytest.raises(PreparedFolderError):
        enter(out / "m")
    assert contents(tmp_path) == before
    assert sorted(tmp_path.rglob("*")) == result


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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def without(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", without)
    with staging(tmp_path / "m") as stage:
        (stage.folder / "m").write_text("new")
        assert not is_free(stage.home)  # nobody else's rests are cleared where that can't be told
        stage.place([(stage.folder / "m", tmp_path / "m")])
    assert contents(tmp_path) == {"m": b"new"}


def test_an_error_of_the_disk_is_no_missing_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="broken"), staging(tmp_path / "m"):
        pass
    assert contents(tmp_path) == {}
