"""The hashes that tell files apart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from threading import Thread

_PIECE_BYTES = 256 << 20
_READ_BYTES = 1 << 20
_MOST_THREADS = 8


def sha256_bytes(data: bytes) -> str:
    """The hex SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_pieces(pieces: Iterable[bytes]) -> str:
    """The same of bytes that come piece by piece, as if they were one."""
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


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
        name = path.relative_to(root).as_posix()
        text = f"{name}\0{content_sha256(path)}\n"
        total.update(text.encode("utf-8", "surrogateescape"))  # a name need not be UTF-8
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


def content_sha256(path: Path) -> str:
    """One hash over a file's content, which all processors work on where it is large."""
    return _sha256_by_pieces(path) if path.stat().st_size > _PIECE_BYTES else sha256_file(path)
