"""What a decode step has to read, and how many sequences fit: arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

from exporter.pipeline.gpu.llama_shaped import LlamaShape

_RESERVE = 0.04  # of the card, for contexts, scratch memory and what the libraries keep


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
        """What a decode step must read at least: the weights, and what is filled, once."""
        return self.weights + batch * past * self.cache_per_token

    def largest_batch(self, total: int, room: int, *, copies: int = 1) -> int:
        """Sequences whose caches fit beside the weights; caches in place lie there once.

        Args:
            total: Bytes of the card.
            room: Positions of each sequence's caches.
            copies: How often the weights lie there: once for each profile that holds them.
        """
        left = total * (1 - _RESERVE) - copies * (self.weights + self.embedding)
        return max(0, int(left // (room * self.cache_per_token)))
