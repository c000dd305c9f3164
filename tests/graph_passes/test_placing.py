"""Results appear all or not at all: a move fails, the disk is full, or the writer is killed."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import resource
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.errors import InterruptedResultError, PreparedFolderError
from graph_passes.files import exchange, placing, record
from graph_passes.files.exchange import can_exchange, identity, put, sync, take_back
from graph_passes.files.placing import (
    append,
    finish_interrupted,
    home_of,
    refuse_outside,
    remove_tree,
    staging,
    working,
)
from graph_passes.files.storage import load_model, save_model
from tests.killed import contents, every_kill, killed, pending, rests, without_exchange

Write = Callable[[Path, str], None]
"""Writes one version of a result into a folder."""


def several_files(folder: Path, version: str, size: int = 1, time: int | None = None) -> None:
    """As a graph with its weights and its report: the data of the earlier one goes."""
    with staging(folder / "m") as stage:
        names = [f"m.{version}.data", "report", "m"]
        for name in names:
            (stage.folder / name).write_text(f"{name} {version}" * size)
            if time is not None:
                os.utime(stage.folder / name, ns=(time, time))
        moves = [(stage.folder / name, folder / name) for name in names]
        stage.place(moves, [file for file in folder.glob("m.*.data") if version not in file.name])


def one_file(folder: Path, version: str) -> None:
    with staging(folder / "m") as stage:
        (stage.folder / "m").write_text(version)
        stage.place([(stage.folder / "m", folder / "m")])


def whole_folder(folder: Path, version: str) -> None:
    with staging(folder / "m") as stage:
        (stage.folder / "below").mkdir()
        for name in ("one", "below/two", f"only-{version}"):
            (stage.folder / name).write_text(version)
        stage.place()


def a_report_elsewhere(folder: Path, version: str) -> None:
    target, report = folder / "m", folder / "reports" / "r"
    with staging(target) as stage, staging(report) as other:
        (stage.folder / "m").write_text(version)
        (other.folder / "r").write_text(version)
        stage.place([(other.folder / "r", report), (stage.folder / "m", target)])


# Times tell files apart, but never which is the newer one: a clock may be set back.
EARLY, LATE = (functools.partial(several_files, time=time) for time in (0, 1 << 62))
WRITERS: list[Write] = [several_files, one_file, whole_folder, a_report_elsewhere]
by_writer = pytest.mark.parametrize("write", WRITERS)


@pytest.fixture(params=["exchange", "no exchange"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no exchange":
        without_exchange(monkeypatch)


on_both_systems = pytest.mark.usefixtures("file_system")
_CASES = [
    *(pytest.param(write, ("old",), system, id=f"{write.__name__}-{system}")
      for write in WRITERS for system in ("exchange", "no exchange")),
    pytest.param(EARLY, ("old",), "exchange", id="early"),
    pytest.param(LATE, ("old",), "no exchange", id="late"),
    pytest.param(several_files, (), "exchange", id="first-files"),
    pytest.param(whole_folder, (), "no exchange", id="first-folder"),
]  # fmt: skip
by_case = pytest.mark.parametrize(
    ("write", "versions", "file_system"), _CASES, indirect=["file_system"]
)
by_some_case = pytest.mark.parametrize(
    ("write", "versions", "file_system"),
    [_CASES[n] for n in (0, 3, 4, 7, 9, 10)],
    indirect=["file_system"],
)
by_two = pytest.mark.parametrize(
    ("write", "file_system"),
    [(several_files, "exchange"), (whole_folder, "no exchange")],
    indirect=["file_system"],
)


def prepared(
    root: Path, write: Write = several_files, versions: tuple[str, ...] = ("old",)
) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "mine").write_text("mine")
    for version in versions:
        write(root, version)
    assert rests(root) == []
    return root


def after_kills(
    tmp_path: Path, write: Write = several_files, versions: tuple[str, ...] = ("old",)
) -> Iterator[Path]:
    """What each possible kill of a writer leaves."""
    whole = prepared(tmp_path / "whole", write, versions)
    return every_kill(
        lambda step: shutil.copytree(whole, tmp_path / str(step)),
        lambda root: write(root, "new"),
    )


@contextlib.contextmanager
def nothing_changes(folder: Path, *errors: type[BaseException]) -> Iterator[None]:
    before = contents(folder)
    with pytest.raises(errors):
        yield
    assert contents(folder) == before
    assert rests(folder) == []


def failing(number: int) -> Callable[..., Any]:
    """A call that the system refuses."""

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fails


# What fails is undone


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("number", [1, 2, 3])
@on_both_systems
def test_a_move_that_fails_puts_all_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], number: int,
    after: bool,
) -> None:  # fmt: skip
    prepared(tmp_path)
    calls: list[Path] = []

    def fails(staged: Path, final: Path) -> None:
        calls.append(final)
        if len(calls) < number or after:
            put(staged, final)
        if len(calls) == number:
            raise error

    monkeypatch.setattr(record, "put", fails)
    with nothing_changes(tmp_path, error):
        several_files(tmp_path, "new")
    assert len(calls) == number


@on_both_systems
def test_what_can_not_be_put_back_is_finished_by_the_next_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = contents(prepared(tmp_path / "new", versions=("old", "new")))
    prepared(tmp_path / "out")
    with monkeypatch.context() as patch:
        for name in ("sync_folders", "take_back"):
            patch.setattr(record, name, failing(errno.EIO))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            several_files(tmp_path / "out", "new")
    assert pending(tmp_path)
    finish_interrupted(tmp_path / "out" / "m")
    assert contents(tmp_path / "out") == new
    assert rests(tmp_path) == []


@by_writer
def test_a_block_that_fails_changes_nothing(tmp_path: Path, write: Write) -> None:
    prepared(tmp_path, write)
    with nothing_changes(tmp_path, RuntimeError), staging(tmp_path / "m") as stage:
        (stage.folder / "half").write_text("half")
        raise RuntimeError


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
@pytest.mark.parametrize("write", [several_files, one_file, whole_folder])
def test_a_disk_that_takes_no_more_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, write: Write
) -> None:
    prepared(tmp_path, write)
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
                write(tmp_path, "new")
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
            several_files(tmp_path, "new", size=10_000)
        several_files(tmp_path, "new")

    assert not killed(limited, step=1 << 30)
    assert (tmp_path / "m").read_text() == "m new"


def test_what_was_cut_off_can_not_be_finished_in_a_folder_that_can_only_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it isn't read, either; where nothing was cut off, reading needs no rights to write."""
    new = contents(prepared(tmp_path / "new", versions=("old", "new")))
    left = [root for root in after_kills(tmp_path) if pending(root)]
    with monkeypatch.context() as patch:
        for call in ("mkdir", "rename", "unlink", "rmdir", "open"):
            patch.setattr(os, call, failing(errno.EROFS))
        finish_interrupted(tmp_path / "new" / "m")
        for root in left:
            with pytest.raises(InterruptedResultError):
                finish_interrupted(root / "m")
    for root in left:
        finish_interrupted(root / "m")
        assert contents(root) == new


@by_writer
@pytest.mark.parametrize("removed", [".depthcut", "."])
def test_a_folder_that_is_removed_meanwhile_is_told(
    tmp_path: Path, write: Write, removed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = prepared(tmp_path / "out", write)
    before, really = contents(out), placing.place

    def goes(*arguments: Any) -> None:
        shutil.rmtree(out / removed)
        really(*arguments)

    monkeypatch.setattr(placing, "place", goes)
    with pytest.raises(FileNotFoundError):
        write(out, "new")
    assert not out.exists() if removed == "." else contents(out) == before
    assert rests(tmp_path) == []


# What a killed writer leaves


@by_case
def test_a_reader_finds_the_old_or_the_new(
    tmp_path: Path, write: Write, versions: tuple[str, ...], file_system: None
) -> None:
    old = contents(prepared(tmp_path / "old", write, versions))
    new = contents(prepared(tmp_path / "new", write, (*versions, "new")))
    seen = []
    for root in after_kills(tmp_path, write, versions):
        assert contents(root) in (old, new) or pending(root), root
        finish_interrupted(root / "m")
        assert pending(root) == []
        seen.append(contents(root))
        assert seen[-1] in (old, new), root
    assert seen[0] == old
    assert seen[-1] == new
    assert seen == sorted(seen, key=lambda state: state == new)


@by_some_case
def test_the_same_command_again_gives_what_an_undisturbed_one_gives(
    tmp_path: Path, write: Write, versions: tuple[str, ...], file_system: None
) -> None:
    new = contents(prepared(tmp_path / "new", write, (*versions, "new")))
    for root in after_kills(tmp_path, write, versions):
        write(root, "new")
        assert contents(root) == new
        assert rests(root) == []


@by_two
def test_another_command_in_the_folder_clears_up(
    tmp_path: Path, write: Write, file_system: None
) -> None:
    old = contents(prepared(tmp_path / "old", write))
    new = contents(prepared(tmp_path / "new", write, ("old", "new")))
    for root in after_kills(tmp_path, write):
        with staging(root / "other") as stage:
            stage.folder.joinpath("other").write_text("other")
            stage.place([(stage.folder / "other", root / "other")])
        assert contents(root) in ({**old, "other": b"other"}, {**new, "other": b"other"})
        assert [path for path in rests(root) if path.parent == root] == []


@by_two
def test_a_reader_may_be_killed_too(tmp_path: Path, write: Write, file_system: None) -> None:
    new = contents(prepared(tmp_path / "new", write, ("old", "new")))
    readers = 0
    for root in after_kills(tmp_path, write):
        step = 1
        while pending(root) and killed(lambda: finish_interrupted(root / "m"), step):  # noqa: B023
            readers, step = readers + 1, step + 1
        if step > 1:
            finish_interrupted(root / "m")
            assert contents(root) == new
            write(root, "new")
            assert rests(root) == []
    assert readers > 10 or write is whole_folder


def graph(value: float) -> ir.Model:
    made = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 20]> '
        "g (float[512] x, float[512] w) => (y) { y = Add(x, w) }"
    )
    weight = made.graph.inputs.pop()
    weight.const_value = ir.tensor(np.full(512, value, np.float32), name="w")
    made.graph.register_initializer(weight)
    made.metadata_props["value"] = str(value)
    return made


@on_both_systems
def test_no_graph_meets_weights_of_another(tmp_path: Path) -> None:
    def before(step: int) -> Path:
        save_model(graph(1.0), tmp_path / str(step) / "m.onnx")
        return tmp_path / str(step) / "m.onnx"

    for path in every_kill(before, lambda path: save_model(graph(2.0), path)):
        loaded = load_model(path)
        weights = loaded.graph.initializers["w"].const_value
        assert weights is not None
        assert set(map(float, weights.numpy())) == {float(loaded.metadata_props["value"])}
        save_model(graph(2.0), path)
        assert [file.suffix for file in sorted(path.parent.iterdir())] == [".onnx", ".data"]


# What was left, and what isn't ours


def test_what_is_kept_stays_until_the_work_is_done(tmp_path: Path) -> None:
    target = tmp_path / "m"
    with contextlib.suppress(KeyboardInterrupt), working(target) as kept:
        kept.mkdir()
        append(kept / "journal", "one\n")
        (kept / placing.SCRATCH).mkdir()
        raise KeyboardInterrupt
    (tmp_path / "other").mkdir()
    one_file(tmp_path / "other", "new")
    with working(target) as kept:
        append(kept / "journal", "two\n")
        assert (kept / "journal").read_text() == "one\ntwo\n"
        assert not (kept / placing.SCRATCH).exists()
        one_file(tmp_path, "new")
    assert contents(tmp_path) == {"m": b"new", "other/m": b"new"}
    assert rests(tmp_path) == []


def test_a_users_links_in_a_folder_that_was_replaced_keep_nobody_out(tmp_path: Path) -> None:
    def before(step: int) -> Path:
        out = prepared(tmp_path / str(step), whole_folder)
        (out / "m" / "link").symlink_to(tmp_path)
        os.mkfifo(out / "m" / "pipe")
        return out

    for out in every_kill(before, lambda out: whole_folder(out, "new")):
        whole_folder(out, "newer")
        assert {path.name for path in (out / "m").iterdir()} == {"one", "below", "only-newer"}
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


# Two names change places


def refusing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The system refuses to exchange names; ENOSYS stands for a C library without it, too."""

    def refuses(*_: object) -> int:
        exchange.ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(exchange, "_renameat2", lambda: refuses)


def a_file(path: Path, text: str) -> None:
    path.write_text(text)


def a_folder(path: Path, text: str) -> None:
    path.mkdir()
    (path / "within").write_text(text)


def a_link(path: Path, text: str) -> None:
    path.symlink_to(text)


def a_pipe(path: Path, text: str) -> None:
    os.mkfifo(path)


def a_device(path: Path, text: str) -> None:
    path.symlink_to("/dev/null")


Make = Callable[[Path, str], None]
PLACES: list[tuple[Make, Make, bool]] = [
    (a_file, a_file, True), (a_folder, a_folder, True), (a_file, a_link, True),
    # The owner of a link has put the results on another disk.
    (a_file, a_folder, False), (a_folder, a_file, False), (a_folder, a_link, False),
    (a_file, a_pipe, False), (a_file, a_device, False),
]  # fmt: skip


@pytest.mark.parametrize("answer", [0, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize(("new", "old", "may"), PLACES)
def test_two_of_a_kind_change_places_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int, new: Make, old: Make, may: bool
) -> None:
    if answer:
        refusing(monkeypatch, answer)
    staged, final = tmp_path / "staged", tmp_path / "final"
    new(staged, "new")
    old(final, "old")
    before, known = contents(tmp_path), (identity(staged), identity(final))
    if may:
        put(staged, final)
        assert (identity(final), identity(staged)) == known
        take_back(staged, final, was_there=True)
    else:
        with pytest.raises((IsADirectoryError, NotADirectoryError, FileExistsError)):
            put(staged, final)
    assert contents(tmp_path) == before
    assert (identity(staged), identity(final)) == known
    assert {path.name for path in tmp_path.iterdir()} == {"staged", "final"}


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES, errno.EXDEV])
def test_other_errors_are_told_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refusing(monkeypatch, number)
    a_file(tmp_path / "staged", "new")
    a_file(tmp_path / "final", "old")
    with pytest.raises(OSError, match="final") as caught:
        put(tmp_path / "staged", tmp_path / "final")
    assert caught.value.errno == number
    assert contents(tmp_path) == {"staged": b"new", "final": b"old"}
    with pytest.raises(OSError, match="other"):
        can_exchange(tmp_path / "tried")


def test_links_and_what_is_no_file_are_not_waited_for(tmp_path: Path) -> None:
    a_folder(tmp_path / "folder", "in it")
    os.mkfifo(tmp_path / "folder" / "pipe")
    a_link(tmp_path / "folder" / "nowhere", "nowhere")
    a_link(tmp_path / "folder" / "device", "/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "folder" / "s"))
        sync(tmp_path / "folder")


def test_a_folder_keeps_its_rights_but_for_everybodys(tmp_path: Path) -> None:
    new, final = tmp_path / "new", tmp_path / "final"
    new.mkdir()
    final.mkdir()
    final.chmod(0o2777)
    put(new, final)
    assert final.stat().st_mode & 0o7777 == 0o2775
