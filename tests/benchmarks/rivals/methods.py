"""All methods of the table: what each cuts, and in which rows it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tests.benchmarks.rivals import ours
from tests.benchmarks.rivals.blockpruner import blockpruner, blockpruner_of_attentions
from tests.benchmarks.rivals.candidate import Candidate
from tests.benchmarks.rivals.cosine import cosine, cosine_of_attentions
from tests.benchmarks.rivals.linear_patch import linear_patch
from tests.benchmarks.rivals.nbl import nbl
from tests.benchmarks.rivals.prune_and_comp import prune_and_comp
from tests.benchmarks.rivals.replace_me import replace_me
from tests.benchmarks.rivals.shortgpt import shortgpt
from tests.benchmarks.rivals.sleb import sleb
from tests.benchmarks.rivals.workplace import Workplace

Unit = Literal["blocks", "attentions"]
Method = Callable[[Workplace, int], Candidate]


def _healed(kind: Any, numbers: ours.Numbers) -> Method:
    return lambda work, dropped: ours.healed(work, numbers(dropped), kind)


def _chosen(numbers: ours.Numbers) -> Method:
    return lambda work, dropped: ours.chosen(work, numbers(dropped))


METHODS: dict[tuple[Unit, str], Method] = {
    ("blocks", "ShortGPT"): shortgpt,
    ("blocks", "cosine"): cosine,
    ("blocks", "Prune&Comp"): prune_and_comp,
    ("blocks", "LinearPatch"): linear_patch,
    ("blocks", "ReplaceMe"): replace_me,
    ("attentions", "cosine"): cosine_of_attentions,
    ("attentions", "NBL"): nbl,
    ("blocks", "SLEB"): sleb,
    ("blocks", "BlockPruner"): blockpruner,
    ("attentions", "BlockPruner"): blockpruner_of_attentions,
    ("blocks", "ours"): _chosen(ours.both_kinds),
    ("attentions", "ours"): _chosen(ours.attentions),
    ("attentions", "ours, maps"): _healed("linear", ours.attentions),
    ("blocks", "ours, folded"): _healed("fold", ours.whole_blocks),
    ("attentions", "ours, folded"): _healed("fold", ours.attentions),
    ("blocks", "ours, distilled"): _healed("distill", ours.both_kinds),
    ("attentions", "ours, distilled"): _healed("distill", ours.attentions),
}
"""In the order in which rows are made: what takes least time first."""

NUMBERS: dict[Unit, tuple[int, ...]] = {"blocks": (4, 7), "attentions": (8, 15)}
TRAINED = "ours, distilled"


@dataclass(frozen=True)
class Row:
    """One cut model of the table."""

    unit: Unit
    dropped: int
    method: str
    distill_tokens: int | None = None

    @property
    def name(self) -> str:
        """What it is called on the command line, and kept under."""
        tokens = "" if self.distill_tokens is None else f", {self.distill_tokens} tokens"
        return f"{self.dropped} {self.unit}, {self.method}{tokens}"

    @property
    def make(self) -> Callable[[Workplace], Candidate]:
        """Makes the cut model."""
        method = METHODS[self.unit, self.method]
        return lambda work: method(work, self.dropped)


def rows(distill_tokens: int) -> Iterator[Row]:
    """All rows, in the order in which they are made."""
    for unit, method in METHODS:
        if method == "ours, folded" and not ours.can_heal("fold"):
            continue
        for dropped in NUMBERS[unit]:
            yield Row(unit, dropped, method, distill_tokens if method == TRAINED else None)


def of_size(table: Iterable[Row], unit: Unit, dropped: int) -> list[Row]:
    """The rows that drop as much, which are compared with one another."""
    return [row for row in table if (row.unit, row.dropped) == (unit, dropped)]
