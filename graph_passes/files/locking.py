"""One lock a target: who writes a file or folder now, and the folder of ours beside it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from graph_passes.errors import PreparedFolderError, TargetInUseError
from graph_passes.files.exchange import absolute

FOLDER = ".depthcut"
"""What depthcut keeps beside its results: never theirs, removed when nothing is in it."""

MOMENT_S = 2.0
"""How long a lock is waited for by default: some hold it for a moment only, to clear it."""

_LOCK = "lock"
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_HELD: set[tuple[Path, int, int]] = set()  # a fork takes the set along, so with the process
_PAUSE_S = 0.05
_HOLDER_BYTES = 4096
_TRIES = 1000


@contextlib.contextmanager
def held(home: Path, what: Path, *, wait_s: float | None = MOMENT_S) -> Iterator[None]:
    """Holds the lock of a folder of ours for as long as the block runs.

    A block within such a block of the same thread goes on under the outer one's lock. The lock
    leaves nothing behind: a block that made nothing leaves the disk as it was, without
    the folders that were made for it.
    """
    key = absolute(home), os.getpid(), threading.get_ident()
    if key in _HELD:
        yield
        return
    made = [path for path in (home, *home.parents) if not os.path.lexists(path)]
    with contextlib.ExitStack() as after:
        after.callback(_remove_empty, made)
        handle = _locked(home, what, wait_s)
        after.callback(os.close, handle)
        after.callback(_remove_empty, (home, *_ours_above(home)))
        after.callback(_remove_lock, home, handle)
        _HELD.add(key)
        after.callback(_HELD.discard, key)
        refuse_links(home, within=False)
        yield


def _remove_lock(home: Path, handle: int) -> None:
    """But not another's, where somebody has removed the folder meanwhile."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(handle), (home / _LOCK).lstat()):
            (home / _LOCK).unlink()


def _remove_empty(folders: Iterable[Path]) -> None:
    for path in folders:
        with contextlib.suppress(OSError):
            path.rmdir()


def is_free(home: Path) -> bool:
    """Whether nobody holds the lock of a folder of ours at this moment, as far as can be told."""
    try:
        handle = os.open(home / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or on a file system without locks
        return False
    finally:
        os.close(handle)
    return True


def refuse_links(home: Path, *, within: bool = True) -> None:
    """Refuses a folder of ours with links in it: depthcut makes none, so somebody prepared it."""
    _refuse_others_above(home)
    links: list[Path] = []
    for folder, folders, files in os.walk(home):
        paths = [Path(folder, name) for name in (*folders, *files)]
        links += [path for path in paths if _kind(path) not in (None, stat.S_IFDIR, stat.S_IFREG)]
        if not within:
            break
    if links:
        raise prepared(links[0], home)


def _refuse_others_above(home: Path) -> None:
    """Refuses what is no folder, or another user's, where one of ours leads through it."""
    for path in (home, *home.parents):
        if FOLDER in path.parts:
            if _kind(path) not in (None, stat.S_IFDIR):
                raise prepared(path, home)
            refuse_other_users(path, home)


def refuse_other_users(path: Path, home: Path) -> None:
    """Refuses what another user has put where many may write, such as in ``/tmp``.

    He could exchange what is made there, and knows what tells this user's files apart. Who owns the
    folder that the results stand in is trusted there.
    """
    holder = _ours(home).parent
    try:
        trusted = path.lstat().st_uid in (os.geteuid(), holder.stat().st_uid)
    except (FileNotFoundError, NotADirectoryError):
        return
    if not trusted:
        raise PreparedFolderError(
            f"{path} belongs to another user than you and than the owner of {holder}.",
            "Use a folder of your own.",
        )


def _kind(path: Path) -> int | None:
    """What stands in a place itself, be it a link; None where there is nothing."""
    try:
        return stat.S_IFMT(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None


def prepared(path: Path, home: Path) -> PreparedFolderError:
    """The error for what stands in a folder of ours where depthcut puts no such thing."""
    return PreparedFolderError(
        f"{path} is nothing that depthcut makes: a link, or no plain file or folder where one "
        "belongs. Somebody else has prepared it.",
        f"Look at it, and remove {_ours(home)} if you don't need it.",
    )


def _ours(home: Path) -> Path:
    """The uppermost folder of ours that holds ``home``."""
    paths = [path for path in (home, *home.parents) if path.name == FOLDER]
    return paths[-1] if paths else home


def _ours_above(home: Path) -> list[Path]:
    """The folders of ours between ``home`` and where the results are."""
    paths = []
    for path in home.parents:
        if home.name == FOLDER or FOLDER not in path.parts:
            break
        paths.append(path)
        if path.name == FOLDER:
            break
    return paths


def _takes(handle: int) -> bool:
    """Whether the lock is ours now; a file system without locks keeps no commands apart."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _locked(home: Path, what: Path, wait_s: float | None) -> int:
    """The lock's file, locked; closing it lets it go."""
    begin = time.monotonic()
    while True:
        handle = _opened(home)
        try:
            taken = _takes(handle)
        except BaseException:
            os.close(handle)
            raise
        if not taken:
            holder = _holder(handle)
            os.close(handle)
            if wait_s is not None and time.monotonic() - begin >= wait_s:
                raise TargetInUseError(
                    f"Another depthcut{holder} writes {what}.",
                    "Wait for it, or use another name.",
                ) from None
            time.sleep(_PAUSE_S)
            continue
        if os.fstat(handle).st_nlink:
            _sign(handle)
            return handle
        os.close(handle)  # the run that held it removed it between our two calls


def _opened(home: Path) -> int:
    """The lock's file, made where it is missing; never written through a link, never emptied."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    for _ in range(_TRIES):
        _refuse_others_above(home)
        lock = home / _LOCK
        if _kind(lock) not in (None, stat.S_IFREG):
            raise prepared(lock, home)
        try:
            home.mkdir(parents=True, exist_ok=True)
            return os.open(lock, flags, 0o666)
        except (FileNotFoundError, FileExistsError):  # another run makes or removes the folder now
            time.sleep(_PAUSE_S / 10)
    raise FileNotFoundError(2, os.strerror(2), str(home))


def _sign(handle: int) -> None:
    """Writes down who holds the lock, for those who find it held."""
    result = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "command": " ".join(Path(sys.argv[0]).name.split() + sys.argv[1:2]) if sys.argv else "",
    }
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        if os.fstat(handle).st_size:  # ext4 writes what was emptied to the disk when it is closed
            os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(result).encode()[:_HOLDER_BYTES], 0)


def _holder(handle: int) -> str:
    """Who holds it, in words; a lock's file says what anybody wrote, so little is believed."""
    try:
        content = json.loads(os.pread(handle, _HOLDER_BYTES, 0))
        number, host, command = content["process"], str(content["host"]), str(content["command"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""
    if not isinstance(number, int) or abs(number) > 1 << 31:
        return ""
    shown = f"{command[:60]!r}, " if command else ""
    return f" ({shown}process {number} on {host[:60]!r})"
