"""Results that appear all or not at all: when a move fails, the disk is full or the folder goes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from graph_passes.errors import (
    InterruptedResultError,
    PreparedFolderError,
    TargetInUseError,
)
from graph_passes.files import placing, record
from graph_passes.files.exchange import put
from graph_passes.files.placing import (
    append,
    finish_interrupted,
    home_of,
    refuse_outside,
    remove_tree,
    staging,
    working,
)
from tests.killed import contents, every_kill, killed, pending, rests, without_exchange

NAMES = ["m.data", "report", "m"]


def write(folder: Path, version: str, size: int = 1) -> None:
    """Three files that belong together; ``stale`` goes with an earlier version."""
    with staging(folder / "m") as stage:
        for name in NAMES:
            (stage.folder / name).write_text(version * size)
        stale = [path for path in folder.glob("stale") if version == "new"]
        stage.place([(stage.folder / name, folder / name) for name in NAMES], stale)


def write_folder(folder: Path, version: str) -> None:
    with staging(folder / "m") as stage:
        (stage.folder / version).write_text(version)
        stage.place()


def write_one(folder: Path, version: str) -> None:
    with staging(folder / "m") as stage:
        (stage.folder / "m").write_text(version)
        stage.place([(stage.folder / "m", folder / "m")])


WRITERS = [write, write_folder, write_one]


@pytest.fixture(params=["exchange", "no exchange"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no exchange":
        without_exchange(monkeypatch)


def prepared(folder: Path, writer: Callable[[Path, str], None] = write) -> Path:
    writer(folder, "old")
    (folder / "mine").write_text("mine")
    if writer is write:
        (folder / "stale").write_text("stale")
    return folder


@contextlib.contextmanager
def nothing_changes(folder: Path, *errors: type[BaseException]) -> Iterator[None]:
    before = contents(folder)
    with pytest.raises(errors):
        yield
    assert contents(folder) == before
    assert rests(folder) == []


# What fails is undone


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.usefixtures("file_system")
def test_a_move_that_fails_puts_all_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], failing: int,
    after: bool,
) -> None:  # fmt: skip
    prepared(tmp_path)
    calls: list[Path] = []

    def fails(staged: Path, final: Path) -> None:
        calls.append(final)
        if len(calls) == failing + 1:
            if after:
                put(staged, final)
            raise error
        put(staged, final)

    monkeypatch.setattr(record, "put", fails)
    with nothing_changes(tmp_path, error):
        write(tmp_path, "new")
    assert len(calls) == failing + 1


@pytest.mark.usefixtures("file_system")
def test_what_can_not_be_put_back_is_finished_by_the_next_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(tmp_path)

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(record, "sync_folders", fails)
        patch.setattr(record, "take_back", fails)
        with pytest.raises(OSError, match="broken"):
            write(tmp_path, "new")
    assert pending(tmp_path)
    finish_interrupted(tmp_path / "m")
    assert [(tmp_path / name).read_text() for name in NAMES] == ["new"] * 3
    assert rests(tmp_path) == []


@pytest.mark.parametrize("writer", WRITERS)
def test_a_block_that_fails_changes_nothing(
    tmp_path: Path, writer: Callable[[Path, str], None]
) -> None:
    prepared(tmp_path, writer)
    with nothing_changes(tmp_path, RuntimeError), staging(tmp_path / "m") as stage:
        (stage.folder / "half").write_text("half")
        raise RuntimeError


def test_a_folder_where_the_record_belongs_is_refused_before_anything_is_made(
    tmp_path: Path,
) -> None:
    (home_of(tmp_path / "m") / "changing.json").mkdir(parents=True)
    with pytest.raises(PreparedFolderError):
        write_folder(tmp_path, "new")
    assert not (tmp_path / "m").exists()
    (home_of(tmp_path / "m") / "changing.json").rmdir()
    write_folder(tmp_path, "new")
    assert (tmp_path / "m" / "new").exists()


def test_a_block_that_fails_leaves_nothing_beside_a_record_that_nobody_can_finish(
    tmp_path: Path,
) -> None:
    home = home_of(tmp_path / "m")
    home.mkdir(parents=True)
    (home / "changing.json").write_text("{}")
    with contextlib.suppress(RuntimeError), staging(tmp_path / "m") as stage:
        (stage.folder / "half").write_text("half")
        raise RuntimeError
    assert [path.name for path in home.iterdir()] == ["changing.json"]


# The disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "mkdir", "rename"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_takes_no_more_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int,
    writer: Callable[[Path, str], None],
) -> None:  # fmt: skip
    prepared(tmp_path, writer)
    if call == "rename":
        without_exchange(monkeypatch)
    really = getattr(os, call)
    before, left, reached = contents(tmp_path), 0, 0

    def fails(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(number, os.strerror(number))
        return really(*arguments, **options)

    for allowed in itertools.count(1):
        left = allowed
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            with contextlib.suppress(OSError):
                writer(tmp_path, "new")
        if left > 0:
            break
        assert contents(tmp_path) == before, allowed
        assert rests(tmp_path) == []
        reached = allowed
    assert reached


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk, in a child of its own."""
    prepared(tmp_path)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with nothing_changes(tmp_path, OSError):
            write(tmp_path, "new", size=10_000)
        write(tmp_path, "new")

    assert not killed(limited, step=1 << 30)
    assert (tmp_path / "m").read_text() == "new"


def test_what_was_cut_off_can_not_be_finished_in_a_folder_that_can_only_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it isn't read, either; where nothing was cut off, reading needs no rights to write."""
    left = [
        place
        for place in every_kill(
            lambda step: prepared(tmp_path / str(step)), lambda place: write(place, "new")
        )
        if pending(place)
    ]
    whole = prepared(tmp_path / "whole")

    def refuses(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        for call in ("mkdir", "rename", "unlink", "rmdir", "open"):
            patch.setattr(os, call, refuses)
        finish_interrupted(whole / "m")
        for place in left:
            with pytest.raises(InterruptedResultError):
                finish_interrupted(place / "m")
    for place in left:
        finish_interrupted(place / "m")
        assert [(place / name).read_text() for name in NAMES] == ["new"] * 3


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("removed", [".depthcut", "."])
def test_a_folder_that_is_removed_meanwhile_is_told(
    tmp_path: Path, writer: Callable[[Path, str], None], removed: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = prepared(tmp_path / "out", writer)
    before, really = contents(out), placing.place

    def goes(*arguments: Any) -> None:
        shutil.rmtree(out / removed)
        really(*arguments)

    monkeypatch.setattr(placing, "place", goes)
    with pytest.raises(FileNotFoundError):
        writer(out, "new")
    assert not out.exists() if removed == "." else contents(out) == before
    assert rests(tmp_path) == []


# What was left, and what isn't ours


def test_only_the_target_itself_is_held(tmp_path: Path) -> None:
    """What another process makes for another target of the folder is not cleared away."""
    with staging(tmp_path / "one") as one:
        (one.folder / "half").write_text("half")
        write(tmp_path, "new")
        assert (one.folder / "half").exists()
        with pytest.raises(TargetInUseError):
            elsewhere(lambda: write_to(tmp_path / "one"))
    assert rests(tmp_path) == []


def write_to(target: Path) -> None:
    with staging(target, wait_s=0):
        pass


def elsewhere(work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as jobs:
        jobs.submit(work).result(timeout=60)


def test_what_is_kept_stays_until_the_work_is_done(tmp_path: Path) -> None:
    target = tmp_path / "m"
    with contextlib.suppress(KeyboardInterrupt), working(target) as kept:
        kept.mkdir()
        append(kept / "journal", "one\n")
        (kept / placing.SCRATCH).mkdir()
        raise KeyboardInterrupt
    write_one(tmp_path / "other", "new")
    with working(target) as kept:
        append(kept / "journal", "two\n")
        assert (kept / "journal").read_text() == "one\ntwo\n"
        assert not (kept / placing.SCRATCH).exists()
        write_one(tmp_path, "new")
    assert contents(tmp_path) == {"m": b"new", "other/m": b"new"}
    assert rests(tmp_path) == []


def test_a_users_links_in_a_folder_that_was_replaced_keep_nobody_out(tmp_path: Path) -> None:
    def before(step: int) -> Path:
        out = prepared(tmp_path / str(step), write_folder)
        (out / "m" / "link").symlink_to(tmp_path)
        os.mkfifo(out / "m" / "pipe")
        return out

    for out in every_kill(before, lambda out: write_folder(out, "new")):
        write_folder(out, "newer")
        assert {path.name for path in (out / "m").iterdir()} == {"newer"}
        assert rests(out) == []
    assert tmp_path.exists()


def test_only_folders_of_ours_are_removed_and_written_to(tmp_path: Path) -> None:
    for name in ("mine", ".depthcut/work"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("text")
    (tmp_path / ".depthcut" / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="mine"):
        remove_tree(tmp_path / "mine")
    with pytest.raises(PreparedFolderError):
        remove_tree(tmp_path / ".depthcut" / "link")
    with pytest.raises(OSError, match=r"\.depthcut/link") as caught:
        append(tmp_path / ".depthcut" / "link", "more")
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(PreparedFolderError):
        refuse_outside(tmp_path / ".depthcut", tmp_path / ".depthcut" / "link" / "file")
    refuse_outside(tmp_path, tmp_path / ".depthcut" / "link" / "file")
    remove_tree(tmp_path / ".depthcut" / "work")
    assert contents(tmp_path) == {"mine/file": b"text"}
    assert home_of(tmp_path / "m").is_relative_to(tmp_path / ".depthcut")
