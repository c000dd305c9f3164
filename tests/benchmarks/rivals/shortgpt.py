"""ShortGPT: the blocks go that turn the stream least, all judged on the whole model."""

from __future__ import annotations

import numpy as np

from tests.benchmarks.rivals.candidate import Candidate
from tests.benchmarks.rivals.streams import span_distances
from tests.benchmarks.rivals.workplace import Workplace


def shortgpt(work: Workplace, dropped: int) -> Candidate:
    """Drops the blocks of the lowest block influence."""
    influence = span_distances(work.model, work.few)
    lowest = np.argsort(influence, kind="stable")[:dropped]
    return Candidate.without_blocks(work.model, [int(layer) for layer in lowest])
