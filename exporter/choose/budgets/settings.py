"""How a plan is looked for: by which search, with which replacements, on which text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from exporter.choose.budgets.budget import Budget
from exporter.choose.budgets.target_speedup import ROUNDS
from exporter.choose.selection import SearchOptions
from exporter.errors import UsageError
from exporter.heal.options import HealOptions


@dataclass(frozen=True)
class PlanSettings:
    """How a plan is looked for.

    Attributes:
        search: Method, objective, shortlist, protected sublayers, tokens, and for ``evolution``
            swaps.
        heal: What takes the dropped branches' places; None: nothing. A search by damage weighs
            replacements as it goes, and takes their kind, rank, ridge and the other domain from
            here; what is chosen by scores is healed afterwards, by all of it.
        calibration: Another text than the scores'.
        batch_size: Samples in one forward pass.
        held_out: Share of the text that is not searched on: half of it to check, half to report on.
        rounds: Candidates that are measured at most.
        allow_all: Lets every attention and every MLP go, where numbers alone are asked for.
    """

    search: SearchOptions = field(default_factory=SearchOptions)
    heal: HealOptions | None = None
    calibration: str | None = None
    batch_size: int = 4
    held_out: float = 0.25
    rounds: int = ROUNDS
    allow_all: bool = False

    def settled(self, budget: Budget) -> PlanSettings:
        """The same with the method named, as it goes with a budget.

        Numbers of sublayers are chosen by their scores where nothing is said, anything else
        greedily.

        Raises:
            UsageError: A budget can't be held by the method that was asked for, or replacements
                can't be weighed so.
        """
        method = self.search.search or ("one-shot" if budget.only_counts else "greedy")
        search = replace(self.search, search=method)
        if not budget.only_counts and not search.by_damage:
            raise UsageError(
                f"Budgets are held by measured damage; --search {method} measures none.",
                "Leave --search away, or take greedy or evolution.",
            )
        if search.by_damage and self.heal is not None:
            self._refuse_own_fits(self.heal)
        return replace(self, search=search)

    def _refuse_own_fits(self, heal: HealOptions) -> None:
        if heal.sequential or heal.calibration not in ((), (self.calibration,)):
            raise UsageError(
                "A search by damage weighs replacements that it fits on its own text, in its own "
                "way.",
                "Leave the options of healing away but for kind, rank, ridge and check text, or "
                "make the plan first and heal it: depthcut heal.",
            )

    @property
    def weighs_replacements(self) -> bool:
        """Whether the search chooses sublayers and their replacements together."""
        return self.search.by_damage and self.heal is not None

    @property
    def heals_afterwards(self) -> bool:
        """Whether replacements are fitted to what was chosen without them."""
        return self.heal is not None and not self.search.by_damage

    @property
    def rank(self) -> int | None:
        """Of linear maps that a search weighs; None: full ones."""
        return None if self.heal is None else self.heal.rank

    def told(self) -> dict[str, int | float | str]:
        """What a plan notes of it, beside what was asked for."""
        search = self.search
        if search.search == "one-shot" and not search.protect:
            return {}
        found: dict[str, int | float | str | None] = {
            "search": search.search,
            "objective": search.objective if search.by_damage else None,
            "heal": self.heal.kind if self.heal is not None and search.by_damage else None,
            "rank": self.rank if search.by_damage else None,
            "protect": ", ".join(search.protect) or None,
        }
        return {name: value for name, value in found.items() if value is not None}
