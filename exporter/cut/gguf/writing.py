"""Writes GGUF files: a header, and tensors that are copied or made a piece at a time."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporter.models.gguf.header import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, Entry, Tensor
from exporter.models.gguf.model_files import SPLIT_COUNT, SPLIT_KEYS, SPLIT_NUMBER, SPLIT_TENSORS
from graph_passes.files.reading import opened

_PIECE_BYTES = 4 << 20
_UINT16 = 2


@dataclass(frozen=True)
class Piece:
    """One tensor to be written.

    Attributes:
        name: In the file.
        shape: The length of a row first.
        kind: The number of its block type.
        nbytes: How many bytes it takes.
        read: Gives them, in pieces.
        is_new: Whether no input has it.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    nbytes: int
    read: Callable[[], Iterable[bytes]]
    is_new: bool = False

    def renamed(self, name: str) -> Piece:
        """The same under another name."""
        return replace(self, name=name)


def piece_of(tensor: Tensor) -> Piece:
    """A tensor of a file as it is there, byte for byte."""
    return Piece(tensor.name, tensor.shape, tensor.kind, tensor.nbytes, lambda: _bytes_of(tensor))


def made_piece(name: str, shape: tuple[int, ...], kind: int, data: bytes) -> Piece:
    """A tensor that is in memory."""
    return Piece(name, shape, kind, len(data), lambda: (data,), is_new=True)


def _bytes_of(tensor: Tensor) -> Iterator[bytes]:
    with opened(tensor.file, named=True) as file:
        file.seek(tensor.start)
        left = tensor.nbytes
        while left and (data := file.read(min(left, _PIECE_BYTES))):
            left -= len(data)
            yield data


@dataclass(frozen=True)
class Head:
    """What stands before the tensors.

    Attributes:
        version: Of the format.
        entries: The metadata.
    """

    version: int
    entries: Sequence[Entry]

    @property
    def alignment(self) -> int:
        """To which tensors are aligned, in bytes."""
        told = (each.whole for each in self.entries if each.key == ALIGNMENT_KEY)
        return next(told, None) or DEFAULT_ALIGNMENT

    def shard(self, number: int, count: int, tensors: int) -> Head:
        """That of one of several shards; the first has the metadata, all tell which they are."""
        own = list(self.entries) if number == 0 else _alignment_of(self.entries)
        kept = [each for each in own if each.key not in SPLIT_KEYS]
        numbered = [
            Entry(SPLIT_NUMBER, _UINT16, struct.pack("<H", number)),
            Entry(SPLIT_COUNT, _UINT16, struct.pack("<H", count)),
            Entry(SPLIT_TENSORS, 5, struct.pack("<i", tensors)),
        ]
        return Head(self.version, [*kept, *numbered])


def write_file(
    path: Path, head: Head, pieces: Sequence[Piece], advance: Callable[[int], None]
) -> None:
    """Writes one file.

    Args:
        path: A new one; the caller stages it.
        head: What stands before the tensors.
        pieces: The tensors.
        advance: Told how many bytes were written.
    """
    alignment = head.alignment
    with path.open("xb") as file:
        file.write(_header(head, pieces))
        _pad(file, alignment)
        for piece in pieces:
            start = file.tell()
            for data in piece.read():
                file.write(data)
                advance(len(data))
            if file.tell() - start != piece.nbytes:
                raise ValueError(f"{piece.name} has {file.tell() - start} bytes")
            _pad(file, alignment)


def _pad(file: Any, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))


def _header(head: Head, pieces: Sequence[Piece]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", head.version, len(pieces), len(head.entries))]
    for entry in head.entries:
        parts += [_named(entry.key), struct.pack("<I", entry.kind), entry.value]
    offset = 0
    for piece in pieces:
        count = len(piece.shape)
        described = struct.pack(f"<I{count}QIQ", count, *piece.shape, piece.kind, offset)
        parts += [_named(piece.name), described]
        offset += piece.nbytes + -piece.nbytes % head.alignment
    return b"".join(parts)


def _named(name: str) -> bytes:
    encoded = name.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _alignment_of(entries: Iterable[Entry]) -> list[Entry]:
    return [each for each in entries if each.key == ALIGNMENT_KEY]
