"""BlockPruner: as SLEB, but attentions and MLPs go one by one."""

from __future__ import annotations

from exporter.choose.selection.options import Group
from tests.benchmarks.rivals.candidate import Candidate
from tests.benchmarks.rivals.searching import greedy_numbers
from tests.benchmarks.rivals.workplace import Workplace


def blockpruner(work: Workplace, dropped: int) -> Candidate:
    """Drops so many attentions and so many MLPs greedily by the perplexity.

    Source: arXiv 2406.10594, section 3 (a block is split into its two residual parts; the part of
    the lowest perplexity when it is masked goes, and the others are measured again). Where this
    differs: the paper fixes the number of parts, not how many are of which kind; here both are
    fixed, so that the result is as fast as one without so many whole blocks.
    """
    numbers: dict[Group, int] = {"attention": dropped, "mlp": dropped}
    return Candidate(greedy_numbers(work.meter, numbers, "perplexity"))


def blockpruner_of_attentions(work: Workplace, dropped: int) -> Candidate:
    """The same with attentions alone."""
    return Candidate(greedy_numbers(work.meter, {"attention": dropped}, "perplexity"))
