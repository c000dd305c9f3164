"""BlockPruner: as SLEB, but attentions and MLPs go one by one."""

from __future__ import annotations

from exporter.choose.selection.options import Group
from tests.benchmarks.rivals.candidate import Candidate
from tests.benchmarks.rivals.searching import greedy_numbers
from tests.benchmarks.rivals.workplace import Workplace


def blockpruner(work: Workplace, dropped: int) -> Candidate:
    """Drops so many attentions and so many MLPs greedily by the perplexity."""
    numbers: dict[Group, int] = {"attention": dropped, "mlp": dropped}
    return Candidate(greedy_numbers(work.meter, numbers, "perplexity"))


def blockpruner_of_attentions(work: Workplace, dropped: int) -> Candidate:
    """The same with attentions alone."""
    return Candidate(greedy_numbers(work.meter, {"attention": dropped}, "perplexity"))
