"""Files and folders that change places in one step, and how each of them is known again."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import stat
from collections.abc import Callable
from pathlib import Path

from graph_passes.files.locations import real

Identity = list[int]
"""Of a file: inode, size in bytes, time of its last change in ns. Of a folder or link: inode.

A move changes none of them, and nobody who prepares a folder for another machine can know them.
"""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
_EARLIER = ".earlier"


def identity(path: Path) -> Identity | None:
    """What tells a file or folder from every other; None where there is none."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISREG(status.st_mode):
        return [status.st_ino, status.st_size, status.st_mtime_ns]
    return [status.st_ino]


def absolute(path: Path) -> Path:
    """A path from the root on, its folders' links followed; it may be a link itself."""
    named = path.name not in ("", "..")
    return real(path.parent) / path.name if named else real(path)


def put(staged: Path, final: Path) -> None:
    """Puts ``staged`` in the place of ``final``, which stands in the place of ``staged`` then.

    Where the file system can't exchange two names, an older ``final`` is moved aside first and is
    missing for a moment; :func:`take_back`, :func:`settle` and a second call know all states.
    """
    if os.path.lexists(final):
        _refuse_other_kind(staged, final)
        if staged.is_dir():
            staged.chmod(stat.S_IMODE(final.stat().st_mode) & ~stat.S_IWOTH)
        _swap(staged, final)
    else:
        staged.rename(final)
        settle(staged)


def settle(staged: Path) -> None:
    """Does what is left of :func:`put` once the new file or folder is in its place."""
    if os.path.lexists(_earlier(staged)):
        _earlier(staged).rename(staged)


def take_back(staged: Path, final: Path, *, was_there: bool) -> None:
    """Undoes :func:`put`, or what it did before it failed."""
    aside = _earlier(staged)
    if os.path.lexists(aside):
        if os.path.lexists(final):
            final.rename(staged)
        aside.rename(final)
    elif was_there:
        _swap(staged, final)
    else:
        final.rename(staged)


def sync(path: Path) -> None:
    """Waits until a file, or a folder with all that is in it, is on the disk."""
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    if path.is_dir():
        for below in path.iterdir():
            sync(below)
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_names(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _earlier(staged: Path) -> Path:
    return staged.with_name(f"{staged.name}{_EARLIER}")


def can_exchange(folder: Path) -> bool:
    """Whether the file system can exchange two names, which is tried in a folder made for it."""
    folder.mkdir(exist_ok=True)
    one, other = folder / "one", folder / "other"
    one.touch()
    other.touch()
    try:
        _exchange(one, other)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        return False
    return True


def _refuse_other_kind(staged: Path, final: Path) -> None:
    """A folder that somebody filled is not replaced by a file, nor a file by a folder.

    A device or a pipe is replaced by neither, nor a link to one such as ``/dev/stdout``.
    """
    if final.exists() and not (final.is_file() or final.is_dir()):
        raise FileExistsError(errno.EEXIST, "No regular file or folder", str(final))
    if final.is_symlink():
        if staged.is_dir():  # its user wants the folder to be elsewhere, on another disk perhaps
            raise NotADirectoryError(errno.ENOTDIR, "A link, which no folder replaces", str(final))
        return
    if final.is_dir() and not staged.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(final))
    if staged.is_dir() and not final.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(final))


def _swap(staged: Path, final: Path) -> None:
    try:
        _exchange(staged, final)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        final.rename(_earlier(staged))
        staged.rename(final)
        settle(staged)


def _exchange(one: Path, other: Path) -> None:
    call = _renameat2()
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(one))
    names = os.fsencode(one), os.fsencode(other)
    if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    """The system's call: Linux has it from 3.15 on, its C library from glibc 2.28."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    result: Callable[..., int] = call
    return result
