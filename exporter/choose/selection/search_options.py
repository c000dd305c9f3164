"""How the sublayers that go are searched for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from exporter.choose.selection.options import Objective

Search = Literal["one-shot", "iterative", "greedy", "evolution"]


@dataclass(frozen=True)
class SearchOptions:
    """How the sublayers are chosen.

    Attributes:
        search: ``one-shot``: the lowest scores. ``iterative``: scored again after each drop.
            ``greedy``: the least added damage at each step. ``evolution``: greedy, then swaps.
            None: one-shot for numbers of sublayers, greedy for budgets that are more than that.
        objective: Which damage greedy and evolution keep small.
        protect: What stays: ``first``, ``last``, ``attention:0,29``.
        every: Iterative: so many drops between two scorings.
        shortlist: Greedy: so many candidates are measured at a step; 0 for all.
        tokens: Greedy and evolution: measured on the first so many tokens of the text.
        seconds: Evolution: time for swaps.
        seed: Evolution: of its draws.
    """

    search: Search | None = None
    objective: Objective = "kl"
    protect: tuple[str, ...] = ()
    every: int = 1
    shortlist: int = 12
    tokens: int = 4096
    seconds: float = 600.0
    seed: int = 0

    @property
    def by_damage(self) -> bool:
        """Whether the damage decides."""
        return self.search in ("greedy", "evolution")
