"""How the sublayers that go are searched for."""

from __future__ import annotations

from typing import Literal

from exporter.choose.selection.options import Objective
from exporter.option_types import Count, DurationOrZero, Seed, Several, Whole
from exporter.options import Options, dataclass, option

DROPPING = "What to drop"
Search = Literal["one-shot", "iterative", "greedy", "evolution"]
OF_SEARCHES = ("objective", "shortlist", "tokens")
"""The fields that only searches by damage heed."""
OF_ONE_SEARCH = {"every": "iterative", "seconds": "evolution", "seed": "evolution"}
"""The fields that one search alone heeds, and which."""


@dataclass(frozen=True)
class SearchOptions(Options):
    """How the sublayers are chosen.

    Attributes:
        search: None: one-shot for numbers of sublayers, greedy for budgets that are more than that.
    """

    search: Search | None = option(
        None,
        "one-shot: the lowest scores. iterative: scored again after each drop. greedy: the least "
        "added damage at each step. evolution: greedy, then swaps.",
        usual="one-shot for numbers, else greedy",
        brief="one-shot, iterative, greedy or evolution",
        section=DROPPING,
    )
    objective: Objective = option(
        "kl",
        "Of --search greedy and evolution: the damage that is kept small.",
        section=DROPPING,
        rare=True,
    )
    protect: tuple[str, ...] = option(
        (),
        "What must stay: first, last, or kind:layers such as attention:0,29. Repeatable.",
        metavar="WHAT",
        section=DROPPING,
    )
    every: Count = option(
        1,
        "Of --search iterative: drops between two scorings.",
        "--rescore-every",
        section=DROPPING,
        config_only=True,
    )
    shortlist: Whole = option(
        12,
        "Of --search greedy and evolution: candidates that are measured at a step; 0 for all.",
        section=DROPPING,
        config_only=True,
    )
    tokens: Several = option(
        4096,
        "Of --search greedy and evolution: tokens of the calibration text that a choice is "
        "measured on.",
        "--search-tokens",
        section=DROPPING,
        config_only=True,
    )
    seconds: DurationOrZero = option(
        600.0,
        "Of --search evolution: time for swaps.",
        "--search-seconds",
        section=DROPPING,
        rare=True,
    )
    seed: Seed = option(
        0,
        "Of --search evolution: seed of the swaps.",
        "--search-seed",
        section=DROPPING,
        config_only=True,
    )

    @property
    def by_damage(self) -> bool:
        """Whether the damage decides."""
        return self.search in ("greedy", "evolution")
