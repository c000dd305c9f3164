"""Files and folders that appear whole or not at all, through the door of graph_passes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from exporter.errors import FULL_DISK, UsageError, error_chain
from graph_passes.files.exchange import absolute
from graph_passes.files.hashing import content_sha256 as content_sha256
from graph_passes.files.hashing import sha256_bytes as sha256_bytes
from graph_passes.files.hashing import sha256_file as sha256_file
from graph_passes.files.hashing import sha256_files as sha256_files
from graph_passes.files.hashing import sha256_pieces as sha256_pieces
from graph_passes.files.kinds import refuse_foreign
from graph_passes.files.locations import real
from graph_passes.files.locking import FOLDER
from graph_passes.files.placing import staging

_LOCK = ".lock"
_TRIES = 100
_LAST_RESORT = Path("/tmp")  # noqa: S108 - for paths that must be short
_NAME_BYTES = len("/-12345678")

_TEXT_WAITS_S = 10.0
# safetensors and tokenizers are written in Rust: the number is in the text only.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
# numpy counts what its write took and does not look at why it stopped.
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


class Sized(Protocol):
    """What takes up so many bytes of a file."""

    @property
    def nbytes(self) -> int:
        """How many."""


_Part = TypeVar("_Part", bound=Sized)


def in_shards(pieces: Sequence[_Part], limit_bytes: int | None) -> list[list[_Part]]:
    """Parts tensors, in their order, by the bytes that a shard may have; None: one part."""
    parts: list[list[_Part]] = [[]]
    filled = 0
    for piece in pieces:
        if limit_bytes is not None and parts[-1] and filled + piece.nbytes > limit_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(piece)
        filled += piece.nbytes
    return parts


def refuse_overwriting(output: Path, inputs: Iterable[Path], kind: str = "") -> None:
    """Keeps a result from taking the place of what it is made from, or of something else."""
    if not output.exists():
        return
    for given in inputs:
        inside = given.is_dir() and real(output).is_relative_to(real(given))
        if inside or (given.exists() and output.samefile(given)):
            raise UsageError(
                f"{output} is an input, or belongs to one; inputs are never changed.",
                "Write the result under another name.",
                code="overwrites-input",
            )
    refuse_foreign(output, kind)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file that is there whole or not at all; an older one is replaced at once."""
    write_texts({path: text})


def write_texts(texts: Mapping[Path, str]) -> None:
    """Writes UTF-8 files of one folder that appear together, in this order, or not at all."""
    first = absolute(next(iter(texts)))
    if FOLDER in first.parent.parts:
        for path, text in texts.items():
            write_private(path, text)
        return
    with staging(first, wait_s=_TEXT_WAITS_S) as stage:
        moves = [(stage.folder / path.name, path) for path in texts]
        for staged, path in moves:
            staged.write_text(texts[path], encoding="utf-8")
        stage.place(moves)


def write_through(path: Path, content: memoryview) -> None:
    """Writes a file through to the disk; it is to take its name when it is whole."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_private(path: Path, text: str) -> None:
    """Writes a UTF-8 file of a folder of ours whose lock is held, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(part, flags, 0o666), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def make_readable(path: Path) -> None:
    """Gives a file that only its owner may read the rights that any new file has."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


@contextlib.contextmanager
def staged_directory(final: Path) -> Iterator[Path]:
    """Gives an empty folder that takes the place of ``final`` when the block ends well.

    An older ``final`` stands until then, and is exchanged as a whole; when the block raises, Ctrl-C
    included, it is untouched and the new one is gone.
    """
    with staging(real(final) if final.is_dir() else final) as stage:
        yield stage.folder
        stage.place()


@contextlib.contextmanager
def telling_full_disk(path: Path) -> Iterator[None]:
    """Turns any library's way to say that it could not write any more into one ``OSError``.

    An error that was made from such an error counts as well, whatever its class.
    """
    try:
        yield
    except Exception as error:
        number = next(filter(None, map(_own_errno, error_chain(error))), None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _own_errno(error: BaseException) -> int | None:
    match = _RUST_ERROR.search(str(error))
    number = int(match[1]) if match else getattr(error, "errno", None)
    if isinstance(error, OSError) and number is None and _SHORT_WRITE.search(str(error)):
        number = errno.ENOSPC
    return number if number in FULL_DISK else None


@contextlib.contextmanager
def scratch_folder(purpose: str, *, longest: int | None = None) -> Iterator[Path]:
    """A new folder that only this user can enter; it is gone after the block.

    Where the user's own folder can't be had, as where another user has made one of that name, it
    lies in a new one with a name that can't be foreseen.
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
        status = root.lstat()
    except FileNotFoundError:
        return True  # it has gone since it was made; opening a file in it will say so
    private = not stat.S_IMODE(status.st_mode) & 0o077
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and private


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
