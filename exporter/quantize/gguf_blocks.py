"""Finds the blocks that a GGUF file has for the weights of a graph exported from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import QuantizationError, first_line
from exporter.optional import require
from exporter.quantize.rewrite import Blocks, Bytes, Floats

_SUPER_BLOCK = 256  # of the K types
_TOLERANCE = 1e-3  # of a step: how far a number may lie beside its type's grid


@dataclass(frozen=True)
class _Type:
    """How one type is read: its bits, its middle where it has one, and its scales and minima."""

    bits: int
    block: int
    middle: int | None
    grid: Callable[[Bytes], tuple[Floats, Floats | None]]

    @property
    def width(self) -> int:
        """Bits of a kernel that holds it."""
        return 4 if self.bits <= 4 else 8


def read_blocks(rows: Bytes, values: Floats, kind: str) -> Blocks:
    """Reads rows of one type.

    rows: the file's bytes, `[rows, bytes]`.
    values: the numbers that `gguf.dequantize` gives for them, `[rows, columns]`.
    """
    gguf, described = require("gguf", extra="gguf"), _TYPES[kind]
    nbytes = int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
    scales, minima = described.grid(rows.reshape(-1, nbytes))
    scales = scales.reshape(len(rows), -1)
    wanted = values.reshape(*scales.shape, described.block)
    if minima is None:
        assert described.middle is not None
        scales = np.where(scales == 0, np.float32(1), scales)
        minima = scales * np.float32(-described.middle)
        # MatMulNBits takes the middle where none is said.
        shift = (1 << (described.width - 1)) - described.middle
        offsets = np.full_like(scales, described.middle + shift)
    else:
        # A block of one number has no scale: that number becomes it, and each q one.
        minima, flat, shift = minima.reshape(scales.shape), scales == 0, 0
        scales = np.where(flat, np.where(minima == 0, 1, minima), scales)
        minima = np.where(flat, 0, minima)
        offsets = -minima / scales
    steps = (wanted - minima[..., None]) / scales[..., None]
    whole = np.round(steps)
    off = np.abs(steps - whole).max(initial=0)
    if (
        not off <= _TOLERANCE
        or whole.min(initial=0) < 0
        or whole.max(initial=0) >= 1 << described.bits
    ):
        raise ValueError(f"numbers lie beside the grid of {kind}")
    return Blocks((whole + shift).astype(np.uint8), scales, offsets, described.width)


def _half(blocks: Bytes, start: int) -> Floats:
    """The float16 numbers that stand at a place of each block, ``[blocks]``."""
    return (
        np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16)[:, 0].astype(np.float32)
    )


def _scale_first(blocks: Bytes) -> tuple[Floats, None]:
    return _half(blocks, 0), None


def _scale_and_minimum(blocks: Bytes) -> tuple[Floats, Floats]:
    return _half(blocks, 0), _half(blocks, 2)


def _scales_of_six_bits(blocks: Bytes) -> tuple[Floats, Floats]:
    """Q4_K and Q5_K: eight scales and minima of 6 bits, each times one of the super-block."""
    quants: Any = require("gguf.quants", extra="gguf")
    scales, minima = quants.Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    scale = _half(blocks, 0)[:, None] * scales.astype(np.float32)
    return scale, -(_half(blocks, 2)[:, None] * minima.astype(np.float32))


def _scales_of_eight_bits(blocks: Bytes) -> tuple[Floats, None]:
    """Q6_K: sixteen scales of 8 bits, each times one of the super-block."""
    start = _SUPER_BLOCK // 2 + _SUPER_BLOCK // 4
    scales = np.ascontiguousarray(blocks[:, start : start + 16]).view(np.int8)
    return _half(blocks, start + 16)[:, None] * scales.astype(np.float32), None


_TYPES: Mapping[str, _Type] = {
    "Q4_0": _Type(4, 32, 8, _scale_first),
    "Q4_1": _Type(4, 32, None, _scale_and_minimum),
    "Q5_0": _Type(5, 32, 16, _scale_first),
    "Q5_1": _Type(5, 32, None, _scale_and_minimum),
    "Q8_0": _Type(8, 32, 128, _scale_first),
    "Q4_K": _Type(4, 32, None, _scales_of_six_bits),
    "Q5_K": _Type(5, 32, None, _scales_of_six_bits),
    "Q6_K": _Type(6, 16, 32, _scales_of_eight_bits),
}


_HINT = "Name the GGUF file that the model was exported from."
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class KeptBlocks:
    """A weight as the file has it."""

    blocks: Blocks
    kinds: str  # "Q4_K+Q6_K" for a weight of several types


class GgufBlocks:
    """The quantised tensors of a GGUF file, found by their rows' numbers."""

    def __init__(self, path: Path) -> None:
        self.path, tensors = path, _tensors(path)
        self._tensors = [t for t in tensors if t.tensor_type.name in _TYPES and t.data.ndim == 2]
        if not self._tensors:
            kinds = ", ".join(sorted({t.tensor_type.name for t in tensors})) or "nothing"
            raise QuantizationError(
                f"{path} holds no blocks that MatMulNBits can hold: its tensors are {kinds}.",
                "Quantise by another method.",
                code="nothing-to-quantize",
            )
        self._places: dict[np.dtype[Any], dict[bytes, tuple[int, int]]] = {}

    def find(self, matrix: Floats, dtype: np.dtype[Any] | None = None) -> KeptBlocks | str:
        """The blocks of a weight.

        matrix: `[K, N]`, as a product multiplies by it.
        """
        dtype = np.dtype(np.float32) if dtype is None else dtype
        places = self._index(dtype)
        results: list[tuple[int, int]] = []
        for row in _rows(np.ascontiguousarray(matrix.T), dtype):
            place = places.get(row)
            if place is None:
                return f"its row {len(results)} is not in {self.path.name}"
            results.append(place)
        numbers = np.array(results, np.int64).reshape(-1, 2)
        parts: dict[int, Blocks] = {}
        for number in map(int, np.unique(numbers[:, 0])):
            tensor = self._tensors[number]
            rows = np.ascontiguousarray(tensor.data[numbers[numbers[:, 0] == number, 1]])
            try:
                parts[number] = read_blocks(rows, _numbers(rows, tensor), tensor.tensor_type.name)
            except ValueError as error:
                return f"{first_line(error)} in {self.path.name}"
        kinds = sorted({self._tensors[number].tensor_type.name for number in parts})
        return KeptBlocks(_in_order(parts, numbers[:, 0]), "+".join(kinds))

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
    """How many bits most of a GGUF file's weights have in the blocks that can be kept of it."""
    counts: Counter[int | None] = Counter()
    for tensor in _tensors(path):
        if tensor.data.ndim == 2:
            kind = _TYPES.get(tensor.tensor_type.name)
            counts[kind.width if kind else None] += int(tensor.n_elements)
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
    alike = {number: part.widened(bits, block) for number, part in parts.items()}
    first = next(iter(alike.values()))
    quants = np.empty((len(owners), *first.quants.shape[1:]), np.uint8)
    scales = np.empty((len(owners), first.scales.shape[1]), np.float32)
    offsets = np.empty_like(scales)
    for number, part in alike.items():
        mine = owners == number
        quants[mine], scales[mine], offsets[mine] = part.quants, part.scales, part.offsets
    return Blocks(quants, scales, offsets, bits)
