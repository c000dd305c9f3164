"""Files and folders that appear whole or not at all, through the door of graph_passes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from exporter.errors import UsageError
from graph_passes.files.exchange import absolute
from graph_passes.files.hashing import content_sha256, sha256_bytes, sha256_file, sha256_files
from graph_passes.files.locations import real
from graph_passes.files.locking import FOLDER
from graph_passes.files.placing import staging

__all__ = [
    "content_sha256",
    "make_readable",
    "refuse_overwriting",
    "sha256_bytes",
    "sha256_file",
    "sha256_files",
    "staged_directory",
    "write_private",
    "write_text",
    "write_texts",
]

_TEXT_WAITS_S = 10.0


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
        inside = given.is_dir() and real(output).is_relative_to(real(given))
        if inside or (given.exists() and output.samefile(given)):
            raise UsageError(
                f"{output} is an input, or belongs to one; inputs are never changed.",
                "Write the result under another name.",
            )


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file that is there whole or not at all; an older one is replaced at once.

    Raises:
        TargetInUseError: Another process writes it.
        OSError: When it can't be written; the older file is then as it was.
    """
    write_texts({path: text})


def write_texts(texts: Mapping[Path, str]) -> None:
    """Writes UTF-8 files of one folder that appear together, in this order, or not at all.

    Raises:
        TargetInUseError: Another process writes the first one.
        OSError: When one can't be written; the older files are then as they were.
    """
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


def write_private(path: Path, text: str) -> None:
    """Writes a UTF-8 file of a folder of ours whose lock is held, whole or not at all.

    Raises:
        OSError: When it can't be written; the older file is then as it was.
    """
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

    Raises:
        TargetInUseError: Another process writes it.
    """
    with staging(real(final) if final.is_dir() else final) as stage:
        yield stage.folder
        stage.place()
