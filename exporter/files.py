"""Files and folders that appear whole or not at all, and the hashes that tell them apart."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Thread

from exporter.errors import UsageError

_PIECE_BYTES = 256 << 20
_READ_BYTES = 1 << 20
_MOST_THREADS = 8


def sha256_bytes(data: bytes) -> str:
    """The hex SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """The hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(paths: Iterable[Path], root: Path) -> str:
    """One hash over several files: their paths relative to ``root`` and their contents.

    A file of more than 256 MiB counts with the hash over the hashes of its pieces of that size, so
    that all processors can work on it; its own hash would take as long as ten copies of it.
    """
    total = hashlib.sha256()
    for path in sorted(paths):
        large = path.stat().st_size > _PIECE_BYTES
        content = _sha256_by_pieces(path) if large else sha256_file(path)
        total.update(f"{path.relative_to(root).as_posix()}\0{content}\n".encode())
    return total.hexdigest()


def _sha256_by_pieces(path: Path) -> str:
    """Threads that a failure elsewhere may leave behind: they don't keep the process alive."""
    count = -(-path.stat().st_size // _PIECE_BYTES)
    digests: list[bytes | BaseException] = [b""] * count
    left = iter(range(count))

    def work() -> None:
        for number in left:
            try:
                digests[number] = _piece_digest(path, number)
            except BaseException as error:  # handed to the one who waits
                digests[number] = error

    workers = min(count, os.cpu_count() or 1, _MOST_THREADS)
    threads = [Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = hashlib.sha256()
    for digest in digests:
        if isinstance(digest, BaseException):
            raise digest
        total.update(digest)
    return total.hexdigest()


def _piece_digest(path: Path, number: int) -> bytes:
    digest = hashlib.sha256()
    position, end = number * _PIECE_BYTES, (number + 1) * _PIECE_BYTES
    with path.open("rb", buffering=0) as file:
        while read := os.pread(file.fileno(), min(_READ_BYTES, end - position), position):
            digest.update(read)
            position += len(read)
    return digest.digest()


def refuse_overwriting(output: Path, inputs: Iterable[Path]) -> None:
    """Keeps a result from taking the place of what it is made from.

    Args:
        output: The file to be written.
        inputs: Files, and folders of which every file counts.

    Raises:
        UsageError: The output is one of them.
    """
    if not output.exists():
        return
    for given in inputs:
        inside = given.is_dir() and output.resolve().is_relative_to(given.resolve())
        if inside or (given.exists() and output.samefile(given)):
            raise UsageError(
                f"{output} is an input, or belongs to one; inputs are never changed.",
                "Write the result under another name.",
            )


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file that is there whole or not at all; an older one is replaced at once.

    Raises:
        OSError: When it can't be written; the older file is then as it was.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        make_readable(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def make_readable(path: Path) -> None:
    """Gives a file that only its owner may read the rights that any new file has."""
    path.chmod(0o666 & ~_umask())


@contextlib.contextmanager
def staged_directory(final: Path) -> Iterator[Path]:
    """Gives an empty folder beside ``final`` that takes its place when the block ends well.

    An older ``final`` is moved aside first and removed only after the new one stands; when the
    block raises, Ctrl-C included, the older one is untouched and the new one is gone.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent))
    try:
        yield stage
        stage.chmod(0o777 & ~_umask())
        _sync_tree(stage)
        swap(stage, final)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def swap(new: Path, final: Path) -> None:
    """Puts the finished file or folder ``new`` in the place of ``final``, on one file system.

    An older folder stands until the new one is in its place; when that fails, it is put back.
    """
    if not final.is_dir() or final.is_symlink():
        new.replace(final)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".old", dir=final.parent))
    try:
        final.replace(old)
        new.replace(final)
    except BaseException:
        if not final.exists():
            old.replace(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
