"""Fractional zero points in kernels that take whole ones.

ONNX Runtime's fast kernels read a block as ``scale * (q - z)`` with a whole ``z``; with ``z`` in
float, MatMulNBits unpacks the matrix to float32 at every call (20 to 200 times the time, and no
8-bit weights at all). But with ``z = z' + e``, ``z'`` whole,

    x W = sum over blocks of  scale * (q - z') x  -  scale * e * (sum of the block's x),

and the second sum is a product of the blocks' sums with a small matrix ``[blocks, N]``. So the
matrix gets these as further rows of the same few bits, and ``x`` the sums as further columns: the
product stays one, longer by a 32nd for blocks of 32. Rounding the further rows leaves an error of
``e / 2^bits``; where the product is computed in float32, they are written as several digits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from exporter.quantize.products import Product
from exporter.quantize.rewrite import PackedWeights, StoredWeight, matmul_nbits
from exporter.quantize.rounding import Blocks, Floats
from graph_passes.finding.weights import BLOCK_SUMS

COMPUTES_IN_INT8 = 4  # the accuracy level
_DIGITS = {4: 4, 8: 2}  # 16 bits: below what float32 loses in a whole model
_SUM_BITS = 4


@dataclass(frozen=True)
class FittedWeight:
    """A matrix with whole zero points, and how it is to be read.

    Attributes:
        blocks: The matrix.
        sums: How many times the sums of ``x``'s blocks, each time filled with zeros to a multiple
            of the block, follow ``x``: 0 where it is read as it is.
    """

    blocks: Blocks
    sums: int = 0


def with_whole_zero_points(blocks: Blocks, level: int) -> FittedWeight:
    """A matrix with any offsets as one with whole zero points.

    Args:
        blocks: The matrix. Where an offset isn't whole, its last block is full.
        level: The accuracy level that the product will have.
    """
    scales, bits, block = blocks.scales, blocks.bits, blocks.block
    zeros = np.clip(np.round(blocks.offsets), 0, (1 << bits) - 1).astype(np.float32)
    rest = scales * (zeros - blocks.offsets)
    if not rest.any():
        return FittedWeight(replace(blocks, offsets=zeros))
    parts = [(blocks.quants.astype(np.float32), scales, zeros)]
    for _ in range(1 if level == COMPUTES_IN_INT8 else _DIGITS[bits]):
        digit, rest = _digit(rest, bits, block)
        parts.append(digit)
    whole, steps, middles = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    return FittedWeight(Blocks(whole.astype(np.uint8), steps, middles, bits), len(parts) - 1)


def _digit(rest: Floats, bits: int, block: int) -> tuple[tuple[Floats, Floats, Floats], Floats]:
    """Rounds ``[N, depth]`` to blocks around the middle, and tells what that leaves."""
    rows, depth = rest.shape
    middle = 1 << (bits - 1)
    wanted = np.pad(rest, ((0, 0), (0, -depth % block))).reshape(rows, -1, block)
    largest = np.abs(wanted).argmax(axis=2, keepdims=True)
    # The range has one step more below the middle: the largest number stands there.
    scale = -np.take_along_axis(wanted, largest, axis=2) / np.float32(middle)
    safe = np.where(scale == 0, np.float32(1), scale)
    steps: Floats = np.clip(np.round(wanted / safe), -middle, middle - 1)
    left: Floats = (wanted - steps * scale).reshape(rows, -1)[:, :depth]
    scales: Floats = scale[..., 0]
    return (steps + middle, scales, np.full_like(scales, middle)), left


class BlockSums:
    """Follows products' inputs by the sums of their blocks, once for each input.

    Args:
        store: Writes the small matrices that sum.
        level: The products' accuracy level.
    """

    def __init__(self, store: PackedWeights, level: int) -> None:
        self._store = store
        self._level = level
        self._matrices: dict[tuple[int, int, int], StoredWeight] = {}
        self._followed: dict[tuple[ir.Value | None, int, int], ir.Value] = {}

    def follow(self, product: Product, block: int, copies: int) -> tuple[ir.Value, int]:
        """Adds what computes ``[x, sums, ..., sums]`` before a product; the product is unchanged.

        Args:
            product: Whose input it is.
            block: Weights that share a scale; the depth is a multiple of it.
            copies: How many times the sums follow, as :func:`with_whole_zero_points` says.

        Returns:
            That value, and how many columns it has.
        """
        width = copies * -(-product.depth // block**2) * block
        key = (product.node.inputs[0], block, copies)
        if key not in self._followed:
            self._followed[key] = self._joined(product, block, copies, width)
        return self._followed[key], product.depth + width

    def _joined(self, product: Product, block: int, copies: int, width: int) -> ir.Value:
        x, graph = product.node.inputs[0], product.node.graph
        assert x is not None
        assert graph is not None
        ones = self._matrix(product, block, copies, width)
        inputs, size = (x, ones.quants, ones.scales), (product.depth, width)
        name = f"{product.name}{BLOCK_SUMS}"
        sums = matmul_nbits(inputs, name, size, _SUM_BITS, block, self._level)
        joined = ir.Node(
            "", "Concat", [x, sums.outputs[0]], [ir.AttrInt64("axis", -1)],
            name=f"{product.name}/followed_by_sums",
        )  # fmt: skip
        for node in (sums, joined):
            node.outputs[0].name, node.outputs[0].type = f"{node.name}/output", x.type
            node.metadata_props.update(product.node.metadata_props)
        graph.insert_before(product.node, [sums, joined])
        return joined.outputs[0]

    def _matrix(self, product: Product, block: int, copies: int, width: int) -> StoredWeight:
        key = (product.depth, block, copies)
        if key not in self._matrices:
            name = f"block_sums_{product.depth}_{block}_{copies}"
            ones = _summing(product.depth, block, copies, width)
            self._matrices[key] = self._store.store(ones, product.weight, name)
        return self._matrices[key]


def _summing(depth: int, block: int, copies: int, width: int) -> Blocks:
    """The matrix of ones that sums ``copies`` times over each block of ``depth`` numbers."""
    blocks = depth // block
    middle = 1 << (_SUM_BITS - 1)
    quants = np.full((width, blocks, block), middle, np.uint8)
    each = width // copies
    for number in range(blocks):
        quants[number::each, number] = middle + 1
    scales = np.ones((width, blocks), np.float32)
    return Blocks(quants, scales, np.full_like(scales, middle), _SUM_BITS)
