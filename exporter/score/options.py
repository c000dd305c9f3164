"""By what and on which text importance is measured."""

from __future__ import annotations

from dataclasses import dataclass

from exporter.score.registry import DEFAULT

KL_POSITIONS = 2
"""The model's answers are compared at every so many positions unless asked otherwise."""


@dataclass(frozen=True)
class ScoreOptions:
    """By what and on which text importance is measured.

    Attributes:
        metrics: Names of :data:`exporter.score.METRICS`; the first is the report's own and
            decides what goes first, the others stand in its ``further``.
        calibration: ``self``, ``pydoc``, a file or ``hf:DATASET``; None: ``self`` for a model that
            generates text and is in memory, else ``pydoc``.
        samples: How many samples; None: about 10,000 tokens.
        sequence_length: Tokens in a sample.
        batch_size: Samples in one forward pass; on a cluster each batch is a piece of work.
        seed: For sampled text and the metric ``random``.
        kl_positions: ``kl`` and ``perplexity`` look at every so many positions.
        blocks: Whether those two skip whole blocks as well: half as much work again.
    """

    metrics: tuple[str, ...] = (DEFAULT,)
    calibration: str | None = None
    samples: int | None = None
    sequence_length: int = 512
    batch_size: int = 4
    seed: int = 0
    kl_positions: int = KL_POSITIONS
    blocks: bool = False
