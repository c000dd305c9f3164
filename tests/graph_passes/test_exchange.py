"""Files and folders that change places, on file systems that can exchange names and others."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from graph_passes.files import exchange
from graph_passes.files.exchange import (
    absolute,
    can_exchange,
    identity,
    put,
    sync,
    take_back,
)
from tests.killed import contents


@pytest.fixture(params=["exchange", "ENOSYS", "EINVAL", "EOPNOTSUPP"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the system says to renameat2; ENOSYS stands for a C library without it, too."""
    if request.param != "exchange":
        _refusing(monkeypatch, getattr(errno, request.param))
    return str(request.param)


def _refusing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
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


Make = Callable[[Path, str], None]
KINDS: list[tuple[Make, Make]] = [(a_file, a_file), (a_folder, a_folder), (a_file, a_link)]


@pytest.mark.parametrize(("make_new", "make_old"), KINDS)
def test_two_change_places_and_back(
    tmp_path: Path, file_system: str, make_new: Make, make_old: Make
) -> None:
    staged, final = tmp_path / "staged", tmp_path / "final"
    make_new(staged, "new")
    make_old(final, "old")
    before, known = contents(tmp_path), (identity(staged), identity(final))
    put(staged, final)
    assert (identity(final), identity(staged)) == known
    take_back(staged, final, was_there=True)
    assert contents(tmp_path) == before
    assert (identity(staged), identity(final)) == known
    assert {path.name for path in tmp_path.iterdir()} == {"staged", "final"}


@pytest.mark.parametrize(
    ("new", "old"), [(a_file, a_folder), (a_folder, a_file), (a_folder, a_link)]
)
def test_a_file_and_a_folder_never_replace_each_other(
    tmp_path: Path, file_system: str, new: Make, old: Make
) -> None:
    new(tmp_path / "staged", "new")
    old(tmp_path / "final", "old")
    before = contents(tmp_path)
    with pytest.raises((IsADirectoryError, NotADirectoryError)):
        put(tmp_path / "staged", tmp_path / "final")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("by_link", [True, False])
def test_no_pipe_or_device_is_replaced(tmp_path: Path, by_link: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    a_file(tmp_path / "staged", "new")
    with pytest.raises(FileExistsError):
        put(tmp_path / "staged", tmp_path / ("link" if by_link else "pipe"))
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path)["staged"] == b"new"


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES, errno.EXDEV])
def test_other_errors_are_told_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    _refusing(monkeypatch, number)
    a_file(tmp_path / "staged", "new")
    a_file(tmp_path / "final", "old")
    with pytest.raises(OSError, match="final") as caught:
        put(tmp_path / "staged", tmp_path / "final")
    assert caught.value.errno == number
    assert contents(tmp_path) == {"staged": b"new", "final": b"old"}
    with pytest.raises(OSError, match="other"):
        can_exchange(tmp_path / "tried")


def test_what_tells_a_file_from_others(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    a_file(one, "same")
    a_file(other, "same")
    known = identity(one)
    assert known != identity(other)
    assert identity(one.rename(tmp_path / "moved")) == known
    os.utime(tmp_path / "moved", ns=(1, 1))
    assert identity(tmp_path / "moved") != known
    assert identity(tmp_path / "nowhere") is None
    assert identity(other / "below a file") is None
    a_link(tmp_path / "link", "nowhere")
    assert identity(tmp_path / "link") is not None
    a_folder(tmp_path / "folder", "in it")
    before = identity(tmp_path / "folder")
    a_file(tmp_path / "folder" / "more", "in it")
    assert identity(tmp_path / "folder") == before


def test_links_and_what_is_no_file_are_not_waited_for(tmp_path: Path) -> None:
    a_folder(tmp_path / "folder", "in it")
    os.mkfifo(tmp_path / "folder" / "pipe")
    a_link(tmp_path / "folder" / "nowhere", "nowhere")
    a_link(tmp_path / "folder" / "device", "/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "folder" / "s"))
        sync(tmp_path / "folder")


def test_folders_are_followed_and_the_name_itself_is_not(tmp_path: Path) -> None:
    a_folder(tmp_path / "folder", "in it")
    a_link(tmp_path / "other", "folder")
    a_link(tmp_path / "folder" / "link", "within")
    assert absolute(tmp_path / "other" / "link") == (tmp_path / "folder" / "link").absolute()
    assert absolute(tmp_path / "folder" / "..") == tmp_path.resolve()


def test_a_folder_keeps_its_rights_but_for_everybodys(tmp_path: Path) -> None:
    new, final = tmp_path / "new", tmp_path / "final"
    new.mkdir()
    final.mkdir()
    final.chmod(0o2777)
    put(new, final)
    assert final.stat().st_mode & 0o7777 == 0o2775


def test_no_folder_takes_the_place_of_a_link(tmp_path: Path) -> None:
    """The results' owner has put them on another disk; a file replaces a link to one."""
    new, store, final = tmp_path / "new", tmp_path / "store", tmp_path / "final"
    new.mkdir()
    store.mkdir()
    final.symlink_to(store)
    with pytest.raises(NotADirectoryError):
        put(new, final)
    assert final.readlink() == store
    (tmp_path / "file").write_text("new")
    (tmp_path / "earlier").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "earlier")
    put(tmp_path / "file", tmp_path / "link")
    assert (tmp_path / "link").read_text() == "new"
    assert (tmp_path / "earlier").read_text() == "old"
