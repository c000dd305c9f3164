"""Keeps a GGUF file's blocks where MatMulNBits can hold them, and notes where it couldn't."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporter.quantize.gguf_blocks import GgufBlocks
from exporter.quantize.zero_points import Fitted, whole_blocks

if TYPE_CHECKING:
    import onnx_ir as ir


class Keeper:
    """Takes weights from a file, and counts.

    Args:
        gguf: The file.
        level: The accuracy level of the products.

    Attributes:
        kept: GGUF type, or ``"Q4_K+Q6_K"`` for a weight of several, to how many weights.
        rounded_anew: Name to reason, of weights that can't be kept.
    """

    def __init__(self, gguf: GgufBlocks, level: int) -> None:
        self._gguf = gguf
        self._level = level
        self.kept: Counter[str] = Counter()
        self.rounded_anew: dict[str, str] = {}

    def fitted(
        self, weight: ir.Value, name: str, matrix: Callable[[], NDArray[np.float32]]
    ) -> Fitted | None:
        """A weight's blocks.

        Args:
            weight: The initializer, for its type.
            name: What the notes call it.
            matrix: Reads it as ``[K, N]``.

        Returns:
            None where the file has none, which is noted.
        """
        assert weight.const_value is not None
        found = self._gguf.find(matrix(), weight.const_value.dtype.numpy())
        if isinstance(found, str):
            self.rounded_anew[name] = found
            return None
        self.kept["+".join(found.kinds)] += 1
        blocks = found.blocks
        return whole_blocks(blocks.quants, blocks.scales, blocks.offsets, blocks.bits, self._level)
