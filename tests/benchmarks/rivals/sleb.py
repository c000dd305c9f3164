"""SLEB: one block after the other goes, the one without which the perplexity rises least."""

from __future__ import annotations

from tests.benchmarks.rivals.candidate import Candidate
from tests.benchmarks.rivals.searching import greedy_numbers
from tests.benchmarks.rivals.workplace import Workplace


def sleb(work: Workplace, dropped: int) -> Candidate:
    """Drops blocks greedily by the perplexity of the calibration text.

    Source: arXiv 2402.09025, section 3.2 (the metric that judges a block on the model as it is
    after the removals before) and its algorithm. Where this differs: after the first step only
    some of the candidates are measured anew; its authors' code (jiwonsong-dev/SLEB) keeps the
    first and the last block, here they are candidates as well.
    """
    return Candidate(greedy_numbers(work.meter, {"block": dropped}, "perplexity"))
