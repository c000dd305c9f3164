"""Reads a GGUF file's header, a stranger's input, within bounds; tensors stay on the disk."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from exporter.errors import GgufFileError
from graph_passes.files.reading import opened


class BlockType(NamedTuple):
    """A block type: its name, and how many numbers and bytes a block has."""

    name: str
    block: int
    nbytes: int


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
    41: BlockType("Q1_0", 128, 18),
}
"""By the numbers that files name them by; those that are not here are copied up to the next one."""

NUMBERS = {known.name: number for number, known in BLOCK_TYPES.items()}
"""The other way round."""


MAGIC = b"GGUF"
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32

UINT32, INT32, BOOL, STRING, ARRAY = 4, 5, 7, 8, 9
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_INTEGERS = frozenset({0, 1, 2, 3, 4, 5, 10, 11})

_VERSIONS = (2, 3)
_HEADER_BYTES = 128 << 20
_MOST_ENTRIES = 1 << 16
_MOST_TENSORS = 1 << 20
_MOST_DIMENSIONS = 4
_KEY_BYTES = (1 << 16) - 1
_MOST_ELEMENTS = 1 << 60
_ALIGNMENTS = (8, 1 << 16)
_HINT = "It may be cut short or broken: fetch or write it again."


@dataclass(frozen=True)
class Entry:
    """One entry of a file's metadata."""

    key: str
    kind: int
    value: bytes  # the value's bytes as the file has them, without the type's number

    @property
    def whole(self) -> int | None:
        """A whole number; None where it is none."""
        return int(self._unpacked(self.kind, self.value)) if self.kind in _INTEGERS else None

    @property
    def text(self) -> str | None:
        """A string; None where it is none, or no UTF-8."""
        return _decoded(self.value[8:]) if self.kind == STRING else None

    @property
    def length(self) -> int | None:
        """How many elements an array has; None where it is none."""
        return struct.unpack_from("<Q", self.value, 4)[0] if self.kind == ARRAY else None

    @property
    def element_kind(self) -> int | None:
        """The number of the elements' type; None where it is no array."""
        return struct.unpack_from("<I", self.value)[0] if self.kind == ARRAY else None

    @property
    def elements(self) -> list[bytes] | None:
        """The bytes of each number of an array; None where it is no array of numbers."""
        if self.element_kind not in _SCALARS:
            return None
        size = struct.calcsize(_SCALARS[self.element_kind])
        return [self.value[at : at + size] for at in range(12, len(self.value), size)]

    @property
    def wholes(self) -> list[int] | None:
        """An array of whole numbers; None where it is none."""
        kind, elements = self.element_kind, self.elements
        if kind not in _INTEGERS or elements is None:
            return None
        return [int(self._unpacked(kind, element)) for element in elements]

    def string(self, number: int) -> str | None:
        """One string of an array of them; None where there is none, or it is no UTF-8."""
        if self.element_kind != STRING or not 0 <= number < (self.length or 0):
            return None
        at = 12
        for _ in range(number):
            at += 8 + int.from_bytes(self.value[at : at + 8], "little")
        length = int.from_bytes(self.value[at : at + 8], "little")
        return _decoded(self.value[at + 8 : at + 8 + length])

    @staticmethod
    def _unpacked(kind: int, value: bytes) -> Any:
        return struct.unpack(_SCALARS[kind], value)[0]


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def whole_entry(key: str, number: int) -> Entry:
    """An entry with a whole number of 32 bits, from 0 on."""
    return Entry(key, UINT32, struct.pack("<I", number))


def text_entry(key: str, text: str) -> Entry:
    """An entry with a string."""
    encoded = text.encode()
    return Entry(key, STRING, struct.pack("<Q", len(encoded)) + encoded)


def array_entry(key: str, kind: int, elements: Sequence[bytes]) -> Entry:
    """An entry with an array of numbers, given by their bytes."""
    return Entry(key, ARRAY, struct.pack("<IQ", kind, len(elements)) + b"".join(elements))


def wholes_entry(key: str, numbers: Sequence[int]) -> Entry:
    """An entry with an array of whole numbers of 32 bits."""
    return array_entry(key, INT32, [struct.pack("<i", number) for number in numbers])


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    file: Path  # where its bytes lie
    start: int
    nbytes: int

    @property
    def kind_name(self) -> str:
        """What its block type is called."""
        known = BLOCK_TYPES.get(self.kind)
        return f"type {self.kind}" if known is None else known.name


@dataclass(frozen=True)
class GgufFile:
    """One GGUF file."""

    path: Path
    version: int
    entries: dict[str, Entry]
    tensors: tuple[Tensor, ...]
    alignment: int  # to which its tensors are aligned, in bytes
    nbytes: int


def read_header(path: Path, folder: Path | None = None) -> GgufFile:
    """Reads all of a file but its tensors."""
    with opened(path, folder, named=folder is None) as file:
        reader = _Reader(path, file, os.fstat(file.fileno()).st_size)
        version, tensors, entries = reader.beginning()
        result = reader.entries(entries)
        alignment = _alignment(path, result.get(ALIGNMENT_KEY))
        described = reader.tensors(tensors)
        data = -(-reader.at // alignment) * alignment
    placed = _placed(path, described, data, alignment, reader.nbytes)
    return GgufFile(path, version, result, tuple(placed), alignment, reader.nbytes)


def broken(path: Path, what: str, code: str, hint: str = _HINT) -> GgufFileError:
    """The error of a file that can't be read."""
    return GgufFileError(f"{path} can't be read as a GGUF file: {what}.", hint, code=code)


class _Reader:
    """Takes the parts of a header off a file, none of them beyond its end."""

    def __init__(self, path: Path, file: Any, nbytes: int) -> None:
        self.path, self.nbytes, self.at = path, nbytes, 0
        self._file = file

    def beginning(self) -> tuple[int, int, int]:
        """The version, and how many tensors and entries follow."""
        if self.nbytes < 4 or self._take(4, "its beginning") != MAGIC:
            raise broken(self.path, "it does not begin with GGUF", "not-gguf", "Give a GGUF file.")
        version = self._number("<I", "its version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            text = "it is written for big-endian machines" if swapped else f"version {version}"
            raise broken(
                self.path,
                text,
                "big-endian" if swapped else "unknown-version",
                "Versions 2 and 3, little-endian, can be read: convert the model anew.",
            )
        tensors = self._count("tensors", _MOST_TENSORS, 24)
        return version, tensors, self._count("entries", _MOST_ENTRIES, 13)

    def entries(self, count: int) -> dict[str, Entry]:
        """The metadata."""
        results: dict[str, Entry] = {}
        for _ in range(count):
            key = self._name("the key of an entry", _KEY_BYTES)
            if key in results:
                raise broken(self.path, f"it has {key} twice", "entry-twice")
            kind = self._number("<I", f"the type of {key}")
            results[key] = Entry(key, kind, self._value(kind, key))
        return results

    def tensors(self, count: int) -> list[tuple[str, tuple[int, ...], int, int]]:
        """Each tensor's name, shape, type and offset."""
        results: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._name("a tensor's name", _KEY_BYTES)
            if name in results:
                raise broken(self.path, f"it has the tensor {name} twice", "tensor-twice")
            dimensions = self._number("<I", f"the shape of {name}")
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise broken(self.path, f"{name} has {dimensions} dimensions", "wrong-shape")
            shape = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions, name))
            if not 0 < math.prod(shape) <= _MOST_ELEMENTS:
                raise broken(self.path, f"{name} has the shape {list(shape)}", "wrong-shape")
            kind = self._number("<I", f"the type of {name}")
            results[name] = (name, shape, kind, self._number("<Q", f"the offset of {name}"))
        return list(results.values())

    def _value(self, kind: int, key: str) -> bytes:
        if kind in _SCALARS:
            return self._take(struct.calcsize(_SCALARS[kind]), key)
        if kind == STRING:
            return self._string(key, self.nbytes)
        if kind != ARRAY:
            raise broken(self.path, f"{key} is of the unknown type {kind}", "unknown-value-type")
        head = self._take(12, key)
        element, length = struct.unpack("<IQ", head)
        if element in _SCALARS:
            return head + self._take(length * struct.calcsize(_SCALARS[element]), key)
        if element != STRING:
            raise broken(
                self.path, f"{key} is an array of the type {element}", "unknown-value-type"
            )
        self._fits(8 * length, key)
        data = bytearray(head)  # a list of millions of strings would take many times as much
        for _ in range(length):
            data += self._string(key, self.nbytes)
        return bytes(data)

    def _string(self, what: str, most: int) -> bytes:
        """A string with its length before it."""
        head = self._take(8, what)
        length = int.from_bytes(head, "little")
        if length > most:
            raise broken(self.path, f"{what} has {length} bytes", "beyond-end")
        return head + self._take(length, what)

    def _name(self, what: str, most: int) -> str:
        text = _decoded(self._string(what, most)[8:])
        if text is None:
            raise broken(self.path, f"{what} is no UTF-8", "not-text")
        return text

    def _count(self, what: str, most: int, least_bytes: int) -> int:
        count: int = self._number("<Q", f"its number of {what}")
        if count > most or count * least_bytes > self.nbytes:
            raise broken(self.path, f"it is said to have {count} {what}", "too-many")
        return count

    def _number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form), what))[0]

    def _take(self, count: int, what: str) -> bytes:
        self._fits(count, what)
        data: bytes = self._file.read(count)
        if len(data) != count:
            raise broken(self.path, f"it ends within {what}", "beyond-end")
        self.at += count
        return data

    def _fits(self, count: int, what: str) -> None:
        if count > self.nbytes - self.at:
            raise broken(self.path, f"{what} reaches beyond its end", "beyond-end")
        if self.at + count > _HEADER_BYTES:
            raise broken(
                self.path, f"its header has more than {_HEADER_BYTES >> 20} MB", "too-large"
            )


def _alignment(path: Path, entry: Entry | None) -> int:
    alignment = DEFAULT_ALIGNMENT if entry is None else entry.whole
    low, high = _ALIGNMENTS
    if alignment is None or not low <= alignment <= high or alignment & (alignment - 1):
        raise broken(path, f"{ALIGNMENT_KEY} is {alignment}", "wrong-alignment")
    return alignment


def _placed(
    path: Path,
    described: Sequence[tuple[str, tuple[int, ...], int, int]],
    data: int,
    alignment: int,
    nbytes: int,
) -> list[Tensor]:
    """The tensors with the places of their bytes, which neither overlap nor leave the file."""
    offsets = sorted({offset for *_, offset in described})
    ends = dict(zip(offsets, [*(data + item for item in offsets[1:]), nbytes], strict=True))
    if len(offsets) != len(described):
        raise broken(path, "two tensors lie at one place", "overlap")
    tensors = []
    for name, shape, kind, offset in described:
        start = data + offset
        room = ends[offset] - start
        size = _size(path, name, shape, kind, room)
        if offset % alignment or room <= 0:
            raise broken(path, f"{name} lies at the offset {offset}", "wrong-offset")
        if size > room:
            raise broken(path, f"{name} takes {size} bytes, and there are {room}", "beyond-end")
        tensors.append(Tensor(name, shape, kind, path, start, size))
    return tensors


def _size(path: Path, name: str, shape: tuple[int, ...], kind: int, room: int) -> int:
    known = BLOCK_TYPES.get(kind)
    if known is None:
        return room
    if shape[0] % known.block:
        raise broken(
            path, f"a row of {name} has {shape[0]} numbers, no multiple of {known.block}",
            "wrong-shape",
        )  # fmt: skip
    return math.prod(shape) // known.block * known.nbytes
