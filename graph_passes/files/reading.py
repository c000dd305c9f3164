"""The one door for reading files that others made: a model's, a record's in an output folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graph_passes.errors import UnsafeInputError
from graph_passes.files.locations import may_lie_in

CONFIG_BYTES = 8 << 20
"""What a config or a plan may take; the largest known ones take a tenth of it."""
TABLE_BYTES = 256 << 20
"""What a tokenizer or an index of shards may take."""
RECORD_BYTES = 64 << 20
"""What a report, scores or a history may take."""
DEEPEST = 64
"""How deep JSON may be nested."""

_PIECE_BYTES = 1 << 20
_MOST_DIGITS = 40
"""Of a whole number in JSON: tokenizers write "no limit" as one of 31."""
_MOST_VALUES = 1 << 24
"""Of a JSON file: Python takes up to 80 bytes for two or three of its own."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NO_FILES = (errno.ELOOP, errno.ENXIO)  # a circle of links; a socket


@contextlib.contextmanager
def opened(
    path: Path, folder: Path | None = None, *, named: bool = False, buffered: bool = True
) -> Iterator[Any]:
    """Opens a file for reading, and looks at what it has opened."""
    # Opening a device alone may do something, so what stands there is looked at before, too.
    _refuse_special(path, _stat(path))
    if not named:
        _refuse_elsewhere(path, Path(os.path.realpath(path)), folder or path.parent)
    handle = os.open(path, _FLAGS)
    with os.fdopen(handle, "rb", buffering=-1 if buffered else 0) as file:
        _refuse_special(path, os.fstat(handle))
        if not named:
            _refuse_elsewhere(path, _place(handle, path), folder or path.parent)
        yield file


def read_bytes(
    path: Path, folder: Path | None = None, *, limit: int = CONFIG_BYTES, named: bool = False
) -> bytes:
    """Reads a whole file, of no more than ``limit`` bytes; see :func:`opened`."""
    with opened(path, folder, named=named) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1) if size <= limit else b""  # read(limit) would take as much
        while size < len(content) <= limit and (more := file.read(_PIECE_BYTES)):
            content += more
    if size > limit or len(content) > limit:
        raise UnsafeInputError(
            f"{path} is larger than the {limit >> 20} MB that such a file may have.",
            "It may be broken: fetch or write it again.",
        )
    return content


def read_text(
    path: Path, folder: Path | None = None, *, limit: int = CONFIG_BYTES, named: bool = False
) -> str:
    """The same as text."""
    return read_bytes(path, folder, limit=limit, named=named).decode("utf-8")


def read_json(
    path: Path, folder: Path | None = None, *, limit: int = CONFIG_BYTES, named: bool = False
) -> Any:
    """The same as JSON."""
    return parse_json(read_bytes(path, folder, limit=limit, named=named), str(path))


def parse_json(text: bytes | str, where: str) -> Any:
    """Parses JSON of others: nested so deep as Python can walk it, with numbers of bounded length.

    Halves of surrogate pairs, which JSON can escape, are no text that could be written again.
    """

    def whole(digits: str) -> int:
        if len(digits) > _MOST_DIGITS:
            raise UnsafeInputError(
                f"{where} holds a number of {len(digits)} digits; at most {_MOST_DIGITS} are read.",
                code="too-many-values",
            )
        return int(digits)

    result = text.decode("utf-8") if isinstance(text, bytes) else text
    if sum(map(result.count, "[{,")) > _MOST_VALUES:
        raise UnsafeInputError(
            f"{where} holds more than {_MOST_VALUES:,} values.", code="too-many-values"
        )
    try:
        content = json.loads(result, parse_int=whole)
        deep = _is_deep(content)
    except RecursionError:
        deep = True
    if deep:
        raise UnsafeInputError(
            f"{where} is nested more than {DEEPEST} deep.", code="too-many-values"
        )
    if _SURROGATE.search(result) and not _is_text(content):
        raise UnsafeInputError(f"{where} holds halves of characters (escapes such as \\ud800).")
    return content


def _is_text(content: Any) -> bool:
    try:
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def copy_file(path: Path, target: Path, folder: Path | None = None, *, named: bool = False) -> Path:
    """Copies a file of a model to a new place; see :func:`opened`."""
    with opened(path, folder, named=named) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
    return target


def check_file(path: Path, folder: Path | None = None, *, limit: int | None = None) -> None:
    """Looks at a file that a library is going to open by itself; only its entry is read."""
    _refuse_elsewhere(path, Path(os.path.realpath(path)), folder or path.parent)
    try:
        status = _stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    _refuse_special(path, status)
    if limit is not None and status.st_size > limit:
        raise UnsafeInputError(
            f"{path} is larger than the {limit >> 20} MB that such a file may have.",
            "It may be broken: fetch or write it again.",
        )


def check_folder(path: Path, folder: Path) -> None:
    """Looks at a folder that a library is going to look into by itself."""
    _refuse_elsewhere(path, Path(os.path.realpath(path)), folder)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        if error.errno in _NO_FILES:
            raise _special(path) from error
        raise


def _refuse_special(path: Path, value: os.stat_result) -> None:
    if not stat.S_ISREG(value.st_mode):
        raise _special(path)


def _special(path: Path) -> UnsafeInputError:
    return UnsafeInputError(
        f"{path} is no regular file: a folder, a pipe, a device or a link in a circle.",
        "Copy the model's files to a folder of their own.",
    )


def _refuse_elsewhere(path: Path, place: Path, folder: Path) -> None:
    if not may_lie_in(Path(os.path.realpath(folder)), place):
        raise UnsafeInputError(
            f"{path} is a link to a file outside {folder}, or lies outside it.",
            "Copy the file itself there, or link it hard (ln), if it is yours to use.",
        )


def _place(handle: int, path: Path) -> Path:
    """Where an open file lies; the system tells it of the descriptor, whatever became of names."""
    try:
        return Path(f"/proc/self/fd/{handle}").readlink()
    except OSError:  # no Linux, or no /proc
        return Path(os.path.realpath(path))


def _is_deep(content: Any) -> bool:
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(DEEPEST):
        level = [
            part
            for holder in level
            for part in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(part, dict | list)
        ]
        if not level:
            return False
    return True
