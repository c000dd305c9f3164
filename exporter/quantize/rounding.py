"""A matrix in blocks of few bits, as ONNX Runtime's MatMulNBits reads it.

The numbers are ONNX Runtime's: its kernels round to nearest, its Python code searches HQQ's zero
points. They are called a matrix at a time, so that the float weights are never in memory together;
the same library's ``MatMulNBitsQuantizer`` loads the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.optional import require

_QUANTIZER = "onnxruntime.quantization.matmul_nbits_quantizer"
_BESIDE_GRID = 0.05  # of a step: what rounding to bfloat16 can do, and far from what chance does

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Blocks:
    """A matrix ``[K, N]`` in blocks along ``K``; the last block may be filled up.

    Its numbers are ``scale * (q - offset)``.

    Attributes:
        quants: uint8 ``[N, blocks, block]``.
        scales: float32 ``[N, blocks]``; they may be negative.
        offsets: float32 ``[N, blocks]``; without zero points the middle of the range.
        bits: 4 or 8: how many a ``q`` needs, in widths that there are kernels for.
    """

    quants: Bytes
    scales: Floats
    offsets: Floats
    bits: int

    @property
    def block(self) -> int:
        """Weights that share a scale."""
        return int(self.quants.shape[2])

    def values(self) -> Floats:
        """The numbers, ``[N, blocks * block]``."""
        steps = self.quants.astype(np.float32) - self.offsets[..., None]
        values: Floats = (steps * self.scales[..., None]).reshape(len(self.quants), -1)
        return values

    def halved(self) -> Blocks:
        """The same numbers in blocks of half the size."""
        rows, blocks, block = self.quants.shape
        return Blocks(
            self.quants.reshape(rows, 2 * blocks, block // 2),
            np.repeat(self.scales, 2, axis=1),
            np.repeat(self.offsets, 2, axis=1),
            self.bits,
        )


def round_to_nearest(matrix: Floats, bits: int, block: int, *, symmetric: bool) -> Blocks:
    """Takes each block's scale from its extremes.

    Args:
        matrix: ``[K, N]``.
        bits: 4 or 8.
        block: Weights that share a scale.
        symmetric: Without zero points; the largest value then stands at the range's lower end.
    """
    quantizer = require(_QUANTIZER, extra="cpu")
    config = quantizer.DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=symmetric, bits=bits
    )
    packed, scales, zeros = quantizer.DefaultWeightOnlyQuantizer(config).qbits_block_quant(matrix)
    offsets = np.full_like(scales, 1 << (bits - 1))
    if not symmetric:
        offsets = unpack_bits(zeros, bits)[:, : scales.shape[1]].astype(np.float32)
    return Blocks(unpack_bits(packed, bits), scales, offsets, bits)


def already_rounded(matrix: Floats, bits: int, block: int) -> Blocks | None:
    """A matrix that was rounded before, as it is: steps of one size from a block's lowest number.

    Such are dequantised blocks of a scale and a minimum, Q4_1's for one. Their zero points are
    fractions, so that rounding them to whole ones would lose what the first rounding kept.

    Args:
        matrix: ``[K, N]``.
        bits: 4 or 8.
        block: Weights that share a scale.

    Returns:
        None where a number lies beside the grid between its block's extremes.
    """
    if len(matrix) % block:
        return None
    blocks = np.ascontiguousarray(matrix.T).reshape(matrix.shape[1], -1, block)
    lowest, highest = blocks.min(axis=2), blocks.max(axis=2)
    most = (1 << bits) - 1
    scales = (highest - lowest) / np.float32(most)
    flat = scales == 0  # its one number becomes the scale, and each q one
    scales = np.where(flat, np.where(lowest == 0, np.float32(1), lowest), scales)
    lowest = np.where(flat, np.float32(0), lowest)
    steps = (blocks - lowest[..., None]) / scales[..., None]
    whole = np.clip(np.round(steps), 0, most)
    if not np.abs(steps - whole).max(initial=0) <= _BESIDE_GRID:
        return None
    offsets = (-lowest / scales).astype(np.float32)
    return Blocks(whole.astype(np.uint8), scales.astype(np.float32), offsets, bits)


def rounded(
    matrix: Floats, bits: int, block: int, *, symmetric: bool, by_hqq: bool = False
) -> Blocks:
    """Rounds without a text.

    Args:
        matrix: ``[K, N]``.
        bits: 4 or 8.
        block: Weights that share a scale.
        symmetric: Without zero points. Else a matrix of 4 bits that was rounded before is kept.
        by_hqq: By HQQ.

    Raises:
        MissingDependencyError: HQQ without PyTorch.
    """
    if by_hqq:
        return round_by_hqq(matrix, bits, block)
    kept = None if symmetric or bits == 8 else already_rounded(matrix, bits, block)
    return kept or round_to_nearest(matrix, bits, block, symmetric=symmetric)


def round_by_hqq(matrix: Floats, bits: int, block: int) -> Blocks:
    """HQQ: moves the zero points, in float, for an error norm below 1 (Badri and Shaji, 2023).

    Raises:
        MissingDependencyError: Without PyTorch, in which ONNX Runtime's code computes it.
    """
    torch = require("torch", extra="torch")
    quantizer = require(_QUANTIZER, extra="cpu")
    config = quantizer.HQQWeightOnlyQuantConfig(block_size=block, bits=bits)
    turned = torch.from_numpy(np.ascontiguousarray(matrix.T))
    quants, scales, zeros = quantizer.HQQWeightOnlyQuantizer(config).quantize_internal(
        turned, bits=bits, group_size=block
    )
    width = matrix.shape[1]
    whole = quants.numpy().astype(np.uint8).reshape(width, -1, block)
    scales, zeros = scales.numpy().astype(np.float32), zeros.numpy().astype(np.float32)
    return Blocks(whole, scales.reshape(width, -1), zeros.reshape(width, -1), bits)


def pack_bits(numbers: Bytes, bits: int) -> Bytes:
    """Packs the last axis: two numbers of 4 bits a byte, the first one in the low half."""
    if bits == 8:
        return np.ascontiguousarray(numbers, np.uint8)
    even = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, numbers.shape[-1] % 2)])
    return np.asarray(even[..., ::2] | (even[..., 1::2] << 4), np.uint8)


def unpack_bits(tight: Bytes, bits: int) -> Bytes:
    """Whole numbers of few bits, one a byte again; an odd count has one too many."""
    if bits == 8:
        return tight
    pairs = np.asarray(np.stack([tight & 15, tight >> 4], axis=-1), np.uint8)
    return pairs.reshape(*tight.shape[:-1], -1)


def scales_of_block(rows: Floats, bits: int, *, symmetric: bool) -> tuple[Floats, Bytes]:
    """Scales and zero points ``[N]`` that :func:`round_to_nearest` takes for one block.

    The same numbers as ONNX Runtime's kernel, in a fraction of its time where a matrix comes one
    block at a time.

    Args:
        rows: ``[block, N]``.
        bits: 4 or 8.
        symmetric: Without zero points, which then are the middle of the range.
    """
    low, high = rows.min(axis=0), rows.max(axis=0)
    if symmetric:
        middle = 1 << (bits - 1)
        far = np.where(np.abs(high) > np.abs(low), high, low)
        return far / np.float32(-middle), np.full(len(far), middle, np.uint8)
    top = np.float32((1 << bits) - 1)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scales = (high - low) / top
    zeros = -low / np.where(scales == 0, 1, scales)
    return scales, np.floor(np.clip(zeros, 0, top) + np.float32(0.5)).astype(np.uint8)
