"""Folders for what is needed only while a command runs, in the system's temporary directory.

All lie in one folder a user, `depthcut-UID`, which nobody else can enter. Beside each stands a file
that its process holds locked as long as it lives: the next use removes what a killed process has
left, and nothing that is in use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_LOCK = ".lock"
_TRIES = 100
_LAST_RESORT = Path("/tmp")  # noqa: S108 - for paths that must be short
_NAME_BYTES = len("/-12345678")


@contextlib.contextmanager
def scratch_folder(purpose: str, *, longest: int | None = None) -> Iterator[Path]:
    """A new folder that only this user can enter; it is gone after the block.

    Where the user's own folder can't be had, as where another user has made one of that name, it
    lies in a new one with a name that can't be foreseen.

    Args:
        purpose: A word for its name.
        longest: The most bytes that its path may have; where the temporary directory's is too long
            for that, it lies in ``/tmp``.

    Raises:
        OSError: No folder can be made.
    """
    root = _root(purpose, longest)
    lock = _new_lock(root, purpose)
    if lock is None:
        with tempfile.TemporaryDirectory(prefix="depthcut-", dir=root.parent) as name:
            folder = Path(name, purpose)
            folder.mkdir(0o700)
            yield folder
        return
    path, handle = lock
    folder = path.with_suffix("")
    try:
        _remove_rests(root)
        folder.mkdir(0o700)
        yield folder
    finally:
        _remove(folder, path)
        os.close(handle)
        with contextlib.suppress(OSError):  # others are in it
            root.rmdir()


def _root(purpose: str, longest: int | None) -> Path:
    usual = Path(tempfile.gettempdir())
    name = f"depthcut-{os.geteuid()}"
    size = len(os.fsencode(usual / name)) + len(purpose) + _NAME_BYTES
    return (usual if longest is None or size <= longest else _LAST_RESORT) / name


def _new_lock(root: Path, purpose: str) -> tuple[Path, int] | None:
    """A new file in the root, and its open handle with the lock; None where the root isn't ours."""
    for _ in range(_TRIES):
        with contextlib.suppress(FileExistsError):
            root.mkdir(0o700)
        if not _is_ours(root):
            return None
        path = root / f"{purpose}-{secrets.token_hex(4)}{_LOCK}"
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # another process has left, and removed the root
            continue
        try:
            taken = _takes(handle)
        except OSError:  # a file system without locks
            os.close(handle)
            path.unlink(missing_ok=True)
            return None
        if taken and os.fstat(handle).st_nlink:
            return path, handle
        os.close(handle)  # another process took the new file for a rest
    return None


def _is_ours(root: Path) -> bool:
    """A folder, no link to one, that belongs to this user and that nobody else can enter."""
    try:
        found = root.lstat()
    except FileNotFoundError:
        return True  # it has gone since it was made; opening a file in it will say so
    private = not stat.S_IMODE(found.st_mode) & 0o077
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and private


def _takes(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _remove_rests(root: Path) -> None:
    """Removes the folders whose locks nobody holds."""
    for path in root.glob(f"*{_LOCK}"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if _takes(handle):
                    _remove(path.with_suffix(""), path)
            finally:
                os.close(handle)


def _remove(folder: Path, lock: Path) -> None:
    """The lock's file stays where something of the folder does: a later use tries again."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        lock.unlink(missing_ok=True)
