"""How a plan is looked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from exporter.choose.budgets.budget import Heal
from exporter.choose.budgets.hit import ROUNDS
from exporter.choose.selection import SearchOptions
from exporter.errors import UsageError


@dataclass(frozen=True)
class PlanSettings:
    """How a plan is looked for.

    Attributes:
        search: Objective, shortlist, protected sublayers, tokens, and for ``evolution`` swaps.
        heal: What may take a branch's place.
        rank: Of linear maps; None: full ones.
        calibration: Another text than the scores'.
        batch_size: Samples in one forward pass.
        check_text: Text of another domain; None: pydoc, or self where pydoc is calibrated on.
        held_out: Share of the text that is not searched on: half of it to check, half to report on.
        rounds: Candidates that are measured at most.

    Raises:
        UsageError: Something is said of replacements that may not be made.
    """

    search: SearchOptions = field(default_factory=lambda: SearchOptions(search="greedy"))
    heal: Heal = "best"
    rank: int | None = None
    calibration: str | None = None
    batch_size: int = 4
    check_text: str | None = None
    held_out: float = 0.25
    rounds: int = ROUNDS

    def __post_init__(self) -> None:
        refuse_idle_healing(self.heal, self.rank, self.check_text)

    def told(self) -> dict[str, int | float | str]:
        """What a plan notes of it, beside what was asked for."""
        found: dict[str, int | float | str] = {
            "search": self.search.search,
            "objective": self.search.objective,
            "heal": self.heal,
        }
        if self.rank is not None:
            found["rank"] = self.rank
        if self.search.protect:
            found["protect"] = ", ".join(self.search.protect)
        return found


def refuse_idle_healing(heal: Heal, rank: int | None, check_text: str | None) -> None:
    """Refuses what is said of replacements that may not be made.

    Raises:
        UsageError: A rank without linear maps, or another domain to judge nothing on.
    """
    if rank is not None and heal in ("none", "bias"):
        raise UsageError(
            f"A rank is for linear maps, and with --heal {heal} there are none.",
            "Leave the rank away, or take --heal linear or best.",
        )
    if check_text is not None and heal == "none":
        raise UsageError(
            "A text of another domain is for judging replacements, and with --heal none there are "
            "none.",
            "Leave it away, or take --heal bias, linear or best.",
        )
