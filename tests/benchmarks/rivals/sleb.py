"""SLEB: one block after the other goes, the one without which the perplexity rises least."""

from __future__ import annotations

from tests.benchmarks.rivals.candidate import Candidate
from tests.benchmarks.rivals.searching import greedy_numbers
from tests.benchmarks.rivals.workplace import Workplace


def sleb(work: Workplace, dropped: int) -> Candidate:
    """Drops blocks greedily by the perplexity of the calibration text."""
    return Candidate(greedy_numbers(work.meter, {"block": dropped}, "perplexity"))
