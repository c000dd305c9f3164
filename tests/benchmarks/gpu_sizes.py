"""What a decode step has to move, and how many sequences fit: arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

from tests.llama_shaped import LlamaShape

_RESERVE = 0.08  # of the device, for contexts, scratch memory and what the libraries keep
_LARGEST = 512


@dataclass(frozen=True)
class Sizes:
    """A Llama with some attentions less, in bytes.

    Attributes:
        weights: Everything but the embedding's table, of which a step reads a few rows.
        embedding: That table.
        cache_per_token: Keys and values of one position of one sequence.
    """

    weights: int
    embedding: int
    cache_per_token: int

    @classmethod
    def of(cls, shape: LlamaShape, *, dropped: int = 0) -> Sizes:
        """Reckons them from the shape.

        Args:
            shape: The whole model.
            dropped: Attentions that were cut out, their norms with them.
        """
        item = shape.dtype.itemsize
        kv_width = shape.kv_heads * shape.head_dim
        attention = 2 * shape.hidden * (shape.hidden + kv_width) + shape.hidden
        mlp = 3 * shape.hidden * shape.intermediate + shape.hidden
        table = shape.vocabulary * shape.hidden
        kept = shape.layers - dropped
        weights = kept * attention + shape.layers * mlp + shape.hidden + table
        return cls(
            weights=int(weights * item),
            embedding=int(table * item),
            cache_per_token=int(2 * kept * kv_width * item),
        )

    def step_bytes(self, batch: int, past: int) -> int:
        """What a decode step must read at least: the weights, and the cache, once."""
        return self.weights + batch * past * self.cache_per_token

    def copied_bytes(self, batch: int, past: int) -> int:
        """What a cache that grows by concatenation reads and writes on top of that."""
        return 2 * batch * past * self.cache_per_token

    def largest_batch(self, free: int, total: int, positions: int, *, profiles: int = 1) -> int:
        """Sequences of which both sets of cache buffers fit beside the weights.

        Args:
            free: Bytes of the device that are free.
            total: Bytes of the device.
            positions: Of each sequence.
            profiles: Of the engine or engines that are loaded; each has weights of its own.
        """
        left = free - profiles * (self.weights + self.embedding) - _RESERVE * total
        return max(0, min(_LARGEST, int(left // (2 * positions * self.cache_per_token))))
