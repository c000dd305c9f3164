"""The largest cut that keeps limits on quality after healing, and what is said where none does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from exporter.artifacts import PruningPlan, TriedCut
from exporter.artifacts.base import TEXTS, Nouns
from exporter.choose.budgets.budget import Floors
from exporter.choose.budgets.candidates import PlanCandidate, damage_words, percent
from exporter.choose.budgets.figures import damage_figures
from exporter.choose.budgets.trial_runs import (
    ENDS,
    HIGH,
    LOW,
    SAME,
    SHARES,
    Ladder,
    TrialRuns,
    rung_of,
)
from exporter.choose.budgets.units import Goal
from exporter.compare.intervals import fewest_to_show
from exporter.errors import UndecidedGoalError, UnmetGoalError
from exporter.models.ablation.damage import SIMILARITY, AnyDamage
from exporter.printable import counted
from exporter.progress import QUIET, Progress
from graph_passes.types import Replacement

_LOWEST_LIMIT = 0.001
"""Of a share that is to be kept, as it is written."""
_OF_EMBEDDINGS = {
    "cosine": "mean cosine of the embeddings", SIMILARITY: "correlation of similarities",
}  # fmt: skip
_REPLACED: dict[Replacement, str] = {"linear": "linear map", "bias": "mean"}


@dataclass(frozen=True)
class QualityLimits:
    """The limits of healed cuts, and how they are told."""

    floors: Floors
    read: Nouns = TEXTS
    usual: bool = False

    def outcome(self, tried: TriedCut) -> str:
        """What a healed cut costs, and whether that is within the limits."""
        if LOW in tried.healed:
            return self._of_embeddings(tried)
        return self._of_classes(tried) if SAME in tried.healed else self._of_tokens(tried)

    def _of_embeddings(self, tried: TriedCut) -> str:
        healed, by = tried.healed, _healed_by(tried)
        asked = {"cosine": self.floors.embedding_cosine, SIMILARITY: self.floors.similarity}
        told = [
            f"the {_OF_EMBEDDINGS[name]} is {healed[name]:.3f} {by}, 95 % interval down to "
            f"{healed[ENDS[name]]:.3f}, {self._least(f'{floor:.3f}')}"
            for name, floor in asked.items()
            if floor is not None and name in healed
        ]
        if self.floors.similarity is not None and SIMILARITY not in healed:
            told.append(f"all texts are equally similar {by}, so there is no correlation")
        return "; ".join(told)

    def _of_classes(self, tried: TriedCut) -> str:
        healed, several = tried.healed, self.read.several
        floor = self.floors.top1_agreement or 0.5
        return (
            f"{healed['top1_agreement']:.1%} of the {several} keep their likeliest class "
            f"{_healed_by(tried)}, 95 % interval down to {healed[SAME]:.1%}, "
            f"{self._least(f'{floor:.1%}')}, which takes {fewest_to_show(floor)} {several} or more"
        )

    def _of_tokens(self, tried: TriedCut) -> str:
        healed, limit = tried.healed, self.floors.perplexity_increase
        rise, high = percent(healed["log_perplexity_increase"]), percent(healed[HIGH])
        allowed = "" if limit is None else f", {limit:.1%} {self._allowed}"
        return (
            f"the perplexity is {rise} higher {_healed_by(tried)}, 95 % interval up to "
            f"{high}{allowed}; same top-1 token {healed['top1_agreement']:.1%}"
        )

    @property
    def _allowed(self) -> str:
        return "is the usual limit without a number" if self.usual else "allowed"

    def _least(self, floor: str) -> str:
        told = "is the usual limit without a number" if self.usual else "is asked for"
        return f"at least {floor} {told}"

    def allowing(self, tried: TriedCut) -> str:
        """The options that would allow a cut; empty where none can."""
        floors, healed = self.floors, tried.healed
        limits = {
            "--min-embedding-cosine": (floors.embedding_cosine, "cosine"),
            "--min-similarity": (floors.similarity, SIMILARITY),
            "--min-top1-agreement": (floors.top1_agreement, "top1_agreement"),
        }
        words = []
        for option, (floor, name) in limits.items():
            end = healed.get(ENDS[name], healed.get(name, -math.inf))
            if floor is None or end >= floor:
                continue
            if end < _LOWEST_LIMIT:
                return ""
            words.append(f"{option} {_rounded(end, math.floor):.3f}")
        rise = healed.get(HIGH, 0.0)
        if rise > floors.log_perplexity_increase:
            words.append(f"--at-most {_rounded(math.expm1(min(50.0, rise)), math.ceil):.1%}")
        return f"{' '.join(words)} would allow it; " if words else ""

    def recovering(self, tried: TriedCut) -> str:
        """What may recover more of a cut's quality."""
        if tried.healed_by == "distill":
            return f"more --time or more {self.read.several} may recover more."
        return "a training may recover more: --heal distill, or without --quick."


def healed_words(tried: TriedCut) -> str:
    """What healed a cut: ``folded weights, 2 linear maps``."""
    if tried.changed_weights is None:  # of an older version, which knew only what was asked
        return tried.healed_by
    counts = Counter(deletion.replacement for deletion in tried.deletions)
    replaced = [counted(counts[kind], noun) for kind, noun in _REPLACED.items() if counts[kind]]
    changed = "trained weights" if tried.healed_by == "distill" else "folded weights"
    return ", ".join([*([changed] if tried.changed_weights else []), *replaced]) or "nothing put in"


def _healed_by(tried: TriedCut) -> str:
    return f"after healing ({healed_words(tried)})"


def _rounded(share: float, towards: Callable[[float], int]) -> float:
    """To a thousandth, to the side on which a limit still allows the share."""
    return towards(1000 * share) / 1000


Candidate = tuple[PlanCandidate, AnyDamage]
"""A cut that may be healed, and what it costs bare."""


def cost_of(damage: AnyDamage, floors: Floors) -> float:
    """The share of the limits that a bare cut uses up."""
    return floors.used_up(damage_figures(damage))


def largest_within(
    candidates: Sequence[Candidate],  # the cuts, from small to large; one at least
    limits: QualityLimits,
    runs: TrialRuns,
    plan_of: Callable[[PlanCandidate], PruningPlan],
    progress: Progress = QUIET,
) -> Ladder:
    """Heals some of ever larger cuts, and takes the largest that keeps the limits."""
    costs = [cost_of(damage, limits.floors) for _, damage in candidates]
    ladder = Ladder(costs, SHARES.get(runs.first.decided, 0.5))
    while (number := ladder.next) is not None:
        if not runs.has_time:
            progress.say(f"plan: no time is left for the cut {number + 1} (--time)")
            break
        candidate, bare = candidates[number]
        plan = plan_of(candidate)
        progress.say(
            f"plan: try the cut {number + 1} of {len(candidates)}: without {plan.describe()} "
            f"(bare: {damage_words(bare)})"
        )
        ladder.tried.append(runs.run(number, plan))
        told = runs.cuts[-1].tried
        progress.say(f"plan: {'holds' if told.holds else 'fails'}: {limits.outcome(told)}")
    return ladder


def refuse_all(
    tried: Sequence[TriedCut],
    limits: QualityLimits,
    goals: Sequence[Goal] = (),
    reach: str = "",
    smaller: bool = False,
    gained: Sequence[str] = (),
) -> NoReturn:
    """Says that nothing is worth cutting, or that the goals cost too much, and how much."""
    rungs = [rung_of(0, cut.healed, limits.floors) for cut in tried]
    costs = [rung.cost for rung in rungs]
    least = tried[costs.index(min(costs))]
    dropped = PruningPlan(deletions=least.deletions).describe()
    dropped += f" ({gained[costs.index(min(costs))]})" if gained else ""
    wanted = " and ".join(goal.words() for goal in goals)
    lead = f"With {wanted} too much quality is lost" if goals else "Nothing is worth cutting"
    code = "goals-beyond-limits" if goals else "nothing-within-limits"
    kind: type[UnmetGoalError] = UnmetGoalError
    if smaller or not all(rung.is_beyond for rung in rungs):
        kind, code = UndecidedGoalError, f"undecided-{code}"
        lead = f"It isn't shown that {wanted} keeps" if goals else "It isn't shown that a cut keeps"
        lead += " the limits on quality"
    raise kind(
        f"{lead}: without {dropped}, {limits.outcome(least)}.",
        f"{reach}{limits.allowing(least)}{limits.recovering(least)}",
        code=code,
    )
