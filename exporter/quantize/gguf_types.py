"""The block types of GGUF files, as whole numbers, scales and offsets.

A block's numbers are ``scale * (q - offset)`` in each of these types; the layouts are llama.cpp's
(``ggml-common.h``). The package ``gguf`` gives the numbers themselves, from which the ``q`` are
read back, so that each type only says here where its scales stand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.optional import require
from exporter.quantize.rounding import Blocks, Bytes, Floats

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


def can_hold(kind: str) -> bool:
    """Whether MatMulNBits can hold a GGUF type, named as in ``gguf.GGMLQuantizationType``."""
    return kind in _TYPES


def width(kind: str) -> int | None:
    """Bits of the kernel that holds a GGUF type, 4 or 8; None where none does."""
    return _TYPES[kind].width if can_hold(kind) else None


def read_blocks(rows: Bytes, values: Floats, kind: str) -> Blocks:
    """Reads rows of one type.

    Args:
        rows: The file's bytes, ``[rows, bytes]``.
        values: The numbers that ``gguf.dequantize`` gives for them, ``[rows, columns]``.
        kind: The type's name.

    Raises:
        KeyError: Not one of the types that :func:`can_hold` takes.
        ValueError: The numbers don't lie on the type's grid.
    """
    described = _TYPES[kind]
    scales, minima = described.grid(rows.reshape(-1, _bytes_of(kind)))
    shape = (len(rows), -1)
    scales = scales.reshape(shape)
    wanted = values.reshape(*scales.shape, described.block)
    if minima is None:
        return _around_middle(wanted, scales, described, kind)
    return _above_minimum(wanted, scales, minima.reshape(shape), described, kind)


def _around_middle(wanted: Floats, scales: Floats, kind: _Type, name: str) -> Blocks:
    assert kind.middle is not None
    shift = (1 << (kind.width - 1)) - kind.middle  # MatMulNBits takes the middle where none is said
    safe = np.where(scales == 0, 1, scales).astype(np.float32)
    quants = _whole(wanted / safe[..., None] + np.float32(kind.middle), kind, name) + shift
    middle = np.full_like(scales, kind.middle + shift)
    return Blocks(quants.astype(np.uint8), scales, middle, kind.width)


def _above_minimum(
    wanted: Floats, scales: Floats, minima: Floats, kind: _Type, name: str
) -> Blocks:
    # A block of one number has no scale: that number becomes it, and each q one.
    flat = scales == 0
    scales = np.where(flat, np.where(minima == 0, 1, minima), scales)
    minima = np.where(flat, 0, minima)
    quants = _whole((wanted - minima[..., None]) / scales[..., None], kind, name)
    return Blocks(quants.astype(np.uint8), scales, -minima / scales, kind.width)


def _whole(steps: Floats, kind: _Type, name: str) -> Floats:
    whole = np.round(steps)
    lowest, highest = whole.min(initial=0), whole.max(initial=0)
    off = np.abs(steps - whole).max(initial=0)
    if not off <= _TOLERANCE or lowest < 0 or highest >= 1 << kind.bits:
        raise ValueError(f"numbers lie beside the grid of {name}")
    return whole


def _bytes_of(kind: str) -> int:
    gguf = require("gguf", extra="gguf")
    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])


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
