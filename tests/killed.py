"""Processes that are killed before a certain change of the disk, as by ``kill -9``."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from graph_passes.files import exchange
from graph_passes.files.locking import FOLDER

_CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "fcntl.flock",
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_EXCHANGED = "depthcut.tests.exchange"

T = TypeVar("T")


def killed(work: Callable[[], Any], step: int) -> bool:
    """Runs something in a child that is killed before its n-th change of the disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the test runner has threads
        child = os.fork()
    if child == 0:
        try:
            _kill_at(step)
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def every_kill(prepare: Callable[[int], T], work: Callable[[T], Any]) -> Iterator[T]:
    """What each possible kill leaves of a work that is prepared anew every time."""
    for step in itertools.count(1):
        place = prepare(step)
        if not killed(lambda: work(place), step):  # noqa: B023
            assert step > 3
            return
        yield place


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system, or a C library, that can't exchange two names."""
    monkeypatch.setattr(exchange, "_renameat2", lambda: None)


def owned_by_another(monkeypatch: pytest.MonkeyPatch, *theirs: Path) -> None:
    """Has some files and folders belong to another user than all others."""
    whole = Path.stat

    def stat(path: Path, *, follow_symlinks: bool = True) -> Any:
        result = whole(path, follow_symlinks=follow_symlinks)
        if path not in theirs:
            return result
        values = {name: getattr(result, name) for name in dir(result) if name.startswith("st_")}
        return SimpleNamespace(**{**values, "st_uid": result.st_uid + 1})

    monkeypatch.setattr(Path, "stat", stat)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file below a folder with its content, and every link, but for what is depthcut's."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        for path in folder.rglob("*")
        if FOLDER not in path.parts and (path.is_symlink() or path.is_file())
    }


def pending(folder: Path) -> list[Path]:
    """The records of interrupted changes below a folder."""
    return sorted(folder.rglob(f"{FOLDER}/**/changing.json"))


def rests(folder: Path) -> list[Path]:
    """What depthcut has left of its own below a folder."""
    return sorted(folder.rglob(FOLDER))


def _kill_at(step: int) -> None:
    left, really = step, exchange._exchange

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
        if writes or event in _CHANGES or event == _EXCHANGED:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted(one: Path, other: Path) -> None:
        sys.audit(_EXCHANGED)
        really(one, other)

    exchange._exchange = counted
    sys.addaudithook(count)
