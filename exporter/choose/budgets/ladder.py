"""Which of ever larger cuts is healed and measured next, to find the largest that holds limits.

A cut's cost is 0 for the whole model and 1 at the limit, whatever is measured. Costs of bare cuts
are known from the search; healed ones take minutes each, so few are tried: the first by the share
of its cost that is expected to remain, the next by the share that was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from exporter.choose.budgets.budget import Floors
from exporter.models.ablation.damage import SIMILARITY

HIGH, LOW, SAME = "log_perplexity_increase_high", "cosine_low", "top1_agreement_low"
ENDS = {
    "log_perplexity_increase": HIGH, "cosine": LOW, "top1_agreement": SAME,
    SIMILARITY: f"{SIMILARITY}_low",
}  # fmt: skip
"""By figure, what the end of its 95 % interval is called that is further from the whole model."""
BETTER_ENDS = {
    "log_perplexity_increase": "log_perplexity_increase_low", "cosine": "cosine_high",
    "top1_agreement": "top1_agreement_high", SIMILARITY: f"{SIMILARITY}_high",
}  # fmt: skip
"""The other end of each."""
SHARES = {"distill": 0.25, "fold": 0.4, "best": 0.5}
"""What is expected to remain of a bare cut's cost after each kind of healing."""
LEAST_SHARE = 0.08
"""No healing is expected to leave less than this share of a cut's cost."""
TRIALS = 3
_LEAST = 1e-6
_CAUTION = 0.1
"""After each cut that failed the next has to leave so much more room: few may be tried."""


@dataclass(frozen=True)
class Rung:
    """A cut that was healed and measured.

    Attributes:
        number: Its place among the cuts, from 0 on.
        cost: After healing.
        high: The upper end of its 95 % interval.
        low: The lower end.
    """

    number: int
    cost: float
    high: float
    low: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether the limit is kept for certain."""
        return self.high <= 1.0

    @property
    def is_beyond(self) -> bool:
        """Whether the limit is broken for certain."""
        return self.low > 1.0


def rung_of(number: int, figures: Mapping[str, float], floors: Floors) -> Rung:
    """A cut by the share of the limits that it uses up: the one rule of what holds them.

    Args:
        number: Its place among the cuts.
        figures: As a plan has them in ``predicted``, with those of :data:`ENDS` and
            :data:`BETTER_ENDS` that are known.
        floors: The limits.
    """

    def used_up(ends: Mapping[str, str]) -> float:
        known = {name: figures[end] for name, end in ends.items() if end in figures}
        return floors.used_up(dict(figures) | known)

    return Rung(number, floors.used_up(figures), used_up(ENDS), used_up(BETTER_ENDS))


def is_hopeless(figures: Mapping[str, float], floors: Floors) -> bool:
    """Whether no healing can be expected to bring a bare cut within the limits."""
    return floors.used_up(figures) * LEAST_SHARE > 1


class Ladder:
    """Ever larger cuts, of which some are tried.

    Args:
        costs: Of the bare cuts, in their order; a larger one is taken to cost no less.
        share: What is expected to remain of them after healing.
    """

    def __init__(self, costs: Sequence[float], share: float) -> None:
        self._costs = list(accumulate((max(_LEAST, cost) for cost in costs), max))
        self._share = share
        self.tried: list[Rung] = []

    @property
    def best(self) -> Rung | None:
        """The largest cut that holds; None where none did."""
        return max((r for r in self.tried if r.holds), key=lambda r: r.number, default=None)

    @property
    def next(self) -> int | None:
        """The cut to try next; None where no other is worth it."""
        low = -1 if self.best is None else self.best.number
        failed = [rung.number for rung in self.tried if not rung.holds and rung.number > low]
        open_ = range(low + 1, min(failed, default=len(self._costs)))
        if not open_ or len(self.tried) >= TRIALS:
            return None
        room = 1 / (1 + _CAUTION * sum(not rung.holds for rung in self.tried))
        likely = [number for number in open_ if self.expected(number) <= room]
        if likely:
            return likely[-1]
        return None if self.best is not None else open_[0]

    def expected(self, number: int) -> float:
        """The upper end of a cut's cost after healing, by the nearest one that was tried."""
        if not self.tried:
            return self._share * self._costs[number]
        near = min(self.tried, key=lambda rung: abs(rung.number - number))
        remaining = max(0.0, near.cost) / self._costs[near.number]
        return remaining * self._costs[number] + (near.high - near.cost)
