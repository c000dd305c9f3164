"""GPTQ: weights rounded one after the other, each one's error made good by those to come.

Source: Frantar et al., arXiv 2210.17323, algorithm 1. The copy of it that ONNX Runtime carries
(``neural_compressor.weight_only.gptq``, 1.32) reads the inverse's factor along a column where the
algorithm takes a row; the factor is triangular, so no error is passed on and the result is round to
nearest. It also rounds the result a second time with scales of its own, which moves most weights
where there are no zero points. Hence the algorithm stands here; the blocks' scales
are ONNX Runtime's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exporter.errors import CalibrationError
from exporter.quantization.rounding import Floats, Packed, pack, round_to_nearest, unpack_one_block

_DAMPING = 0.01  # of the mean of the diagonal, as in the paper

Doubles = NDArray[np.float64]


def inverse_factor(hessian: Doubles, name: str) -> Doubles:
    """The upper Cholesky factor of the damped Hessian's inverse.

    Args:
        hessian: The mean of ``x x^T`` over the calibration text, ``[K, K]``; it is overwritten.
        name: What an error calls the layer.

    Raises:
        CalibrationError: It holds no finite numbers, nothing but zeros, or can't be inverted.
    """
    diagonal = np.einsum("ii->i", hessian)
    if not np.isfinite(hessian).all():
        raise CalibrationError(
            f"GPTQ can't be computed for {name}: its input is not finite on the calibration text.",
            "Choose another text, or another method.",
        )
    mean = float(diagonal.mean())
    if mean <= 0:
        raise CalibrationError(
            f"GPTQ can't be computed for {name}: its input is zero all over the calibration text.",
            "Choose another text, or another method.",
        )
    diagonal += _DAMPING * mean
    try:
        factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    except np.linalg.LinAlgError:
        factor = np.full((1, 1), np.nan)
    if not np.isfinite(factor).all():
        raise CalibrationError(
            f"GPTQ can't be computed for {name}: the Hessian of its input can't be inverted.",
            "Take more calibration text, or another method.",
        )
    return np.ascontiguousarray(factor)


def gptq(matrix: Floats, factor: Doubles, bits: int, block: int, *, symmetric: bool) -> Packed:
    """Rounds a matrix by its input's second moments.

    Args:
        matrix: ``[K, N]``; it is unchanged.
        factor: From :func:`inverse_factor`, ``[K, K]``.
        bits: 4 or 8.
        block: Weights that share a scale, which is set when the first of them is reached.
        symmetric: Without zero points.
    """
    left, factor = matrix.copy(), factor.astype(np.float32)
    depth = len(left)
    blocks = _Blocks(left.shape, bits, block, symmetric)
    for start in range(0, depth, block):  # what lies behind a block is brought up to date once
        stop = min(start + block, depth)
        errors = np.zeros((stop - start, left.shape[1]), np.float32)
        blocks.begin(left[start:stop])
        for row in range(start, stop):
            error = (left[row] - blocks.rounded(row, left[row])) / factor[row, row]
            left[row + 1 : stop] -= np.outer(factor[row, row + 1 : stop], error)
            errors[row - start] = error
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return blocks.packed(depth)


class _Blocks:
    """A matrix that is filled row after row, a block's scale first."""

    def __init__(self, shape: tuple[int, ...], bits: int, block: int, symmetric: bool) -> None:
        depth, width = shape
        blocks = -(-depth // block)
        self._bits, self._block, self._symmetric = bits, block, symmetric
        self._quants = np.zeros((width, blocks, block), np.uint8)
        self._scales = np.zeros((width, blocks), np.float32)
        self._zeros = np.zeros((width, blocks), np.uint8)
        self._number = -1

    def begin(self, rows: Floats) -> None:
        """Sets the next block's scales and zero points."""
        self._number += 1
        near = round_to_nearest(rows, self._bits, self._block, symmetric=self._symmetric)
        scales, zeros = unpack_one_block(near, self._bits)
        self._scales[:, self._number], self._zeros[:, self._number] = scales, zeros

    def rounded(self, row: int, numbers: Floats) -> Floats:
        """Rounds one row, ``[N]``, of the block that was begun last."""
        scale = self._scales[:, self._number]
        zero = self._zeros[:, self._number].astype(np.float32)
        steps = np.round(numbers / np.where(scale == 0, 1, scale)) + zero
        whole: Floats = np.clip(steps, 0, (1 << self._bits) - 1)
        self._quants[:, self._number, row % self._block] = whole
        return (whole - zero) * scale

    def packed(self, depth: int) -> Packed:
        """The whole matrix; what fills its last block stands for zero."""
        if depth % self._block:
            self._quants[:, -1, depth % self._block :] = self._zeros[:, -1:]
        zeros = None if self._symmetric else self._zeros
        return pack(self._quants, self._scales, zeros, self._bits)
