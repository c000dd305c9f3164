"""GPTQ: weights rounded one after the other, each one's error made good by those to come.

Source: Frantar et al., arXiv 2210.17323, algorithm 1. The copy of it that ONNX Runtime carries
(``neural_compressor.weight_only.gptq``, 1.32) reads the inverse's factor along a column where the
algorithm takes a row; the factor is triangular, so no error is passed on and the result is round to
nearest. It also rounds the result a second time with scales of its own, which moves most weights
where there are no zero points. Hence the algorithm stands here; the blocks' scales
are those of ONNX Runtime.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from exporter.errors import CalibrationError
from exporter.quantize.rounding import Blocks, Bytes, Floats, scales_of_block

_DAMPING = 0.01  # of the mean of the diagonal, as in the paper


def inverse_factor(moments: Floats, name: str) -> Floats:
    """The upper Cholesky factor of the damped Hessian's inverse.

    Args:
        moments: The Hessian: the mean of ``x x^T`` over the calibration text, ``[K, K]``; it is
            unchanged.
        name: What an error calls the layer.

    Returns:
        ``[K, K]``, float32; computed in float64.

    Raises:
        CalibrationError: It holds no finite numbers, nothing but zeros, or can't be inverted.
    """
    hessian = moments.astype(np.float64)
    diagonal = np.einsum("ii->i", hessian)
    if not np.isfinite(hessian).all():
        raise CalibrationError(
            f"GPTQ can't be computed for {name}: its input is not finite in calibration.",
            "Calibrate on something else, or take another method.",
            code="not-finite",
        )
    mean = float(diagonal.mean())
    if mean <= 0:
        raise CalibrationError(
            f"GPTQ can't be computed for {name}: its input is zero all over in calibration.",
            "Calibrate on something else, or take another method.",
            code="input-zero",
        )
    diagonal += _DAMPING * mean
    factor = _factor_of_inverse(hessian)
    if factor is None:
        raise CalibrationError(
            f"GPTQ can't be computed for {name}: the Hessian of its input can't be inverted.",
            "Calibrate on more, or take another method.",
            code="singular-hessian",
        )
    return factor


def _factor_of_inverse(hessian: NDArray[np.float64]) -> Floats | None:
    """``U`` with ``H^-1 = U^T U``; None where H isn't positive definite.

    With ``H = R R^T`` and R upper, which is Cholesky of H turned over, U is ``R^-1``: a quarter of
    the work that inverting H and factoring the inverse is.
    """
    try:
        turned = np.linalg.cholesky(hessian[::-1, ::-1])
    except np.linalg.LinAlgError:
        return None
    factor, failed = lapack.dtrtri(turned[::-1, ::-1])
    if failed or not np.isfinite(factor).all():
        return None
    return np.ascontiguousarray(factor, np.float32)


def gptq(matrix: Floats, factor: Floats, bits: int, block: int, *, symmetric: bool) -> Blocks:
    """Rounds a matrix by its input's second moments.

    A row takes up the errors of all rows before it when its turn comes, block by block: so nothing
    as large as the matrix is written again and again.

    Args:
        matrix: ``[K, N]``; it is unchanged.
        factor: From :func:`inverse_factor`, ``[K, K]``.
        bits: 4 or 8.
        block: Weights that share a scale, which is set when the first of them is reached.
        symmetric: Without zero points.
    """
    depth, width = matrix.shape
    blocks = -(-depth // block)
    errors = np.empty((depth, width), np.float32)
    quants = np.zeros((blocks * block, width), np.uint8)
    scales, zeros = np.zeros((blocks, width), np.float32), np.zeros((blocks, width), np.uint8)
    for number, start in enumerate(range(0, depth, block)):
        here = slice(start, min(start + block, depth))
        rows = matrix[here] - factor[:start, here].T @ errors[:start]
        scales[number], zeros[number] = scales_of_block(rows, bits, symmetric=symmetric)
        _round_block(
            rows, factor[here, here], scales[number], zeros[number], (1 << bits) - 1,
            quants[here], errors[here],
        )  # fmt: skip
    quants[depth:] = zeros[-1]  # what fills the last block stands for zero
    grouped = quants.reshape(blocks, block, width).transpose(2, 0, 1)
    return Blocks(grouped, scales.T, zeros.T.astype(np.float32), bits)


def _round_block(
    rows: Floats,
    factor: Floats,
    scale: Floats,
    zero: Bytes,
    top: int,
    quants: Bytes,
    errors: Floats,
) -> None:
    """Rounds one block's rows in turn; fills in what they become and the errors to pass on."""
    step = np.where(scale == 0, 1, scale)
    offset = zero.astype(np.float32)
    for row, weights in enumerate(rows):
        weights -= factor[:row, row] @ errors[:row]
        whole = np.clip(np.rint(weights / step) + offset, 0, top)
        quants[row] = whole
        errors[row] = (weights - (whole - offset) * scale) / factor[row, row]
