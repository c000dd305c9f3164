"""Finds the blocks that a GGUF file has for the weights of a graph exported from it.

Weights are known again by their numbers, a row at a time, not by their names: exporters name them
as they like, put the rows of several tensors into one product (packed QKV) and change the order of
rows (llama.cpp interleaves those of rotated heads, transformers undoes it). Blocks lie along a row,
so none of this touches them. A weight of which any row isn't in the file has no blocks there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import QuantizationError, first_line
from exporter.optional import require
from exporter.quantize.gguf_types import can_hold, read_blocks, width
from exporter.quantize.rounding import Blocks

Floats = NDArray[np.float32]

_HINT = "Name the GGUF file that the model was exported from."
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class KeptBlocks:
    """A weight as the file has it.

    Attributes:
        blocks: All rows, in the weight's order.
        kinds: The GGUF types that they had, such as ``("Q4_1",)``.
    """

    blocks: Blocks
    kinds: tuple[str, ...]


class GgufBlocks:
    """The quantised tensors of a GGUF file, found by their rows' numbers.

    Args:
        path: The file. Its tensors stay on disk; 8 bytes a row are held.

    Raises:
        QuantizationError: It can't be read, or holds no tensor whose type can be kept.
        MissingDependencyError: Without the package ``gguf``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = _read(path)
        self._places: dict[np.dtype[Any], dict[bytes, tuple[int, int]]] = {}

    @property
    def kinds(self) -> frozenset[str]:
        """The types of the tensors that can be kept."""
        return frozenset(tensor.tensor_type.name for tensor in self._tensors)

    def find(self, matrix: Floats, dtype: np.dtype[Any] | None = None) -> KeptBlocks | str:
        """The blocks of a weight.

        Args:
            matrix: ``[K, N]``, as a product multiplies by it.
            dtype: In which the graph holds it, for rounding the file's numbers alike; float32
                where none is said.

        Returns:
            The blocks, or why there are none.
        """
        dtype = np.dtype(np.float32) if dtype is None else dtype
        places = self._index(dtype)
        found: list[tuple[int, int]] = []
        for row in _rows(np.ascontiguousarray(matrix.T), dtype):
            place = places.get(row)
            if place is None:
                return f"its row {len(found)} is not in {self.path.name}"
            found.append(place)
        return self._gathered(found)

    def _gathered(self, places: Sequence[tuple[int, int]]) -> KeptBlocks | str:
        numbers = np.array(places, np.int64).reshape(-1, 2)
        used = np.unique(numbers[:, 0])
        kinds = tuple(sorted({self._tensors[number].tensor_type.name for number in used}))
        try:
            parts = {int(number): self._blocks(number, numbers) for number in used}
        except ValueError as error:
            return f"{first_line(error)} in {self.path.name}"
        return KeptBlocks(_in_order(parts, numbers[:, 0]), kinds)

    def _blocks(self, number: int, places: NDArray[np.int64]) -> Blocks:
        """The rows of one tensor that are asked for, in the order in which they are."""
        tensor = self._tensors[number]
        rows = np.ascontiguousarray(tensor.data[places[places[:, 0] == number, 1]])
        return read_blocks(rows, _numbers(rows, tensor), tensor.tensor_type.name)

    def _index(self, dtype: np.dtype[Any]) -> dict[bytes, tuple[int, int]]:
        if dtype not in self._places:
            places: dict[bytes, tuple[int, int]] = {}
            for number, tensor in enumerate(self._tensors):
                for start in range(0, len(tensor.data), _ROWS_AT_ONCE):
                    values = _numbers(tensor.data[start : start + _ROWS_AT_ONCE], tensor)
                    for row, digest in enumerate(_rows(values, dtype), start):
                        places.setdefault(digest, (number, row))
            self._places[dtype] = places
        return self._places[dtype]


def most_bits(path: Path) -> int | None:
    """How many bits most of a GGUF file's weights have in the blocks that can be kept of it.

    Returns:
        4 or 8; None where most of them can't be kept.

    Raises:
        QuantizationError: It can't be read.
        MissingDependencyError: Without the package ``gguf``.
    """
    counts: Counter[int | None] = Counter()
    for tensor in _tensors(path):
        if tensor.data.ndim == 2:
            counts[width(tensor.tensor_type.name)] += int(tensor.n_elements)
    return counts.most_common(1)[0][0] if counts else None


def _tensors(path: Path) -> list[Any]:
    gguf = require("gguf", extra="gguf")
    try:
        tensors: list[Any] = gguf.GGUFReader(path).tensors
    # The reader has no error class of its own; a cut file gives anything.
    except Exception as error:
        raise QuantizationError(
            f"{path} can't be read as a GGUF file: {first_line(error)}.", _HINT, code="unreadable"
        ) from error
    return tensors


def _read(path: Path) -> list[Any]:
    tensors = _tensors(path)
    kept = [t for t in tensors if can_hold(t.tensor_type.name) and t.data.ndim == 2]
    if not kept:
        kinds = ", ".join(sorted({tensor.tensor_type.name for tensor in tensors})) or "nothing"
        raise QuantizationError(
            f"{path} holds no blocks that MatMulNBits can hold: its tensors are {kinds}.",
            "Quantise by another method.",
            code="no-usable-blocks",
        )
    return kept


def _numbers(rows: NDArray[np.uint8], tensor: Any) -> Floats:
    quants: Any = require("gguf.quants", extra="gguf")
    values: Floats = quants.dequantize(np.ascontiguousarray(rows), tensor.tensor_type)
    return values


def _rows(values: Floats, dtype: np.dtype[Any]) -> Iterator[bytes]:
    """A digest of each row's bytes; zeros lose their sign, which exporters may turn."""
    rounded = values.astype(dtype) + dtype.type(0)
    for row in rounded:
        yield blake2b(row.tobytes(), digest_size=8).digest()


def _in_order(parts: dict[int, Blocks], owners: NDArray[np.int64]) -> Blocks:
    """Rows of several tensors as one matrix, in the widest type and the smallest block of them."""
    bits = max(part.bits for part in parts.values())
    block = min(part.block for part in parts.values())
    alike = {number: _as(part, bits, block) for number, part in parts.items()}
    first = next(iter(alike.values()))
    quants = np.empty((len(owners), *first.quants.shape[1:]), np.uint8)
    scales = np.empty((len(owners), first.scales.shape[1]), np.float32)
    offsets = np.empty_like(scales)
    for number, part in alike.items():
        mine = owners == number
        quants[mine], scales[mine], offsets[mine] = part.quants, part.scales, part.offsets
    return Blocks(quants, scales, offsets, bits)


def _as(part: Blocks, bits: int, block: int) -> Blocks:
    while part.block > block:
        part = part.halved()
    if part.bits < bits:  # moved towards the middle of the wider range, where none need be said
        shift = (1 << (bits - 1)) - (1 << (part.bits - 1))
        return Blocks(part.quants + np.uint8(shift), part.scales, part.offsets + shift, bits)
    return part
