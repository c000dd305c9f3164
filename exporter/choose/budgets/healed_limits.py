"""The largest cut that keeps limits on quality after healing, and what is said where none does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from exporter.artifacts import PruningPlan, Speedup, TriedCut
from exporter.artifacts.nouns import nouns_of
from exporter.choose.budgets.budget import USUAL_FLOORS, Floors
from exporter.choose.budgets.candidates import PlanCandidate, damage_words
from exporter.choose.budgets.figures import Outcome, damage_figures, elsewhere, size_figures
from exporter.choose.budgets.healed_words import QualityLimits
from exporter.choose.budgets.ladder import SHARES, Ladder, Rung, is_hopeless, rung_of
from exporter.choose.budgets.refusals import gains_of
from exporter.choose.budgets.solving import Solving
from exporter.choose.budgets.trial_runs import TrialRuns, time_of, trial_options
from exporter.choose.budgets.units import Goal, Unit
from exporter.choose.selection.affordable import SEARCH_S
from exporter.choose.selection.options import Step
from exporter.errors import UndecidedGoalError, UnmetGoalError
from exporter.models.ablation.damage import AnyDamage
from exporter.progress import QUIET, Progress


@dataclass(frozen=True, eq=False)
class Candidate:
    """A cut that may be healed.

    Attributes:
        candidate: What is dropped.
        damage: Of the bare cut, on the text that was searched on.
    """

    candidate: PlanCandidate
    damage: AnyDamage


def cost_of(damage: AnyDamage, floors: Floors) -> float:
    """The share of the limits that a bare cut uses up."""
    return floors.used_up(damage_figures(damage))


def largest_within(
    candidates: Sequence[Candidate],
    limits: QualityLimits,
    runs: TrialRuns,
    plan_of: Callable[[PlanCandidate], PruningPlan],
    progress: Progress = QUIET,
) -> Ladder:
    """Heals some of ever larger cuts, and takes the largest that keeps the limits.

    Args:
        candidates: The cuts, from small to large; one at least.
        limits: What each is held against.
        runs: Heals and measures.
        plan_of: Makes a plan of a cut.
        progress: Told what is tried, and why.

    Returns:
        What was tried; with the best one, if any keeps the limits.
    """
    costs = [cost_of(each.damage, limits.floors) for each in candidates]
    ladder = Ladder(costs, SHARES.get(runs.first.decided, 0.5))
    while (number := ladder.next) is not None:
        if not runs.has_time:
            progress.say(f"plan: no time is left for the cut {number + 1} (--time)")
            break
        plan = plan_of(candidates[number].candidate)
        progress.say(
            f"plan: try the cut {number + 1} of {len(candidates)}: without {plan.describe()} "
            f"(bare: {damage_words(candidates[number].damage)})"
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
    """Says that nothing is worth cutting, or that the goals cost too much, and what it would cost.

    Args:
        tried: What was healed.
        limits: What it was held against.
        goals: What was to be reached beside them.
        reach: What of the goals is in reach.
        smaller: Whether smaller cuts were not tried.
        gained: What each of those that were healed gains.

    Raises:
        UnmetGoalError: That is so.
        UndecidedGoalError: A smaller cut, or a measurement on more text, may still keep the limits.
    """
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


class HealedLimits(Solving):
    """Plans whose limits on quality are those of the healed cut."""

    def _held_after_healing(self) -> Outcome:
        """The cut that reaches the goals, or the largest, that keeps the limits once it is healed.

        Raises:
            UnmetGoalError: There is none.
            PlanError: A limit can't be shown, whatever is cut.
        """
        candidates, speedup = self._candidates()
        if not candidates[0].candidate.options:
            self._refuse_nothing(candidates[0].candidate)
        assert self.settings.heal is not None
        runs = TrialRuns(
            self.loaded,
            trial_options(self.settings.heal, self.report.calibration, self.settings.calibration),
            self.floors,
            self._work.trials,
            [*self.report.calibration.texts, *self._parts()["chosen_on"]],
            time.monotonic() - self._began,
            self._progress,
        )
        limits = QualityLimits(
            self.floors,
            nouns_of(self.loaded.ref.architecture),
            usual=self.budget.floors == USUAL_FLOORS,
        )
        found = largest_within(candidates, limits, runs, self._chosen_plan, self._progress)
        if found.best is None:
            tried = [each.tried for each in runs.cuts]
            reach = self._in_reach(candidates[0], found.tried[0]) if self.goals else ""
            smaller = min(rung.number for rung in found.tried) > 0
            gains = [candidates[rung.number].candidate.gain(self._used_up) for rung in found.tried]
            gained = [self._used_up.words(gain) for gain in gains]
            refuse_all(tried, limits, self.goals, reach, smaller, gained)
        candidate = candidates[found.best.number].candidate
        cut = runs.cuts[found.tried.index(found.best)]
        figures = size_figures(
            self.budget, candidate, self.sizes, self.costs, self.settings.rank, speedup
        )
        return Outcome(
            runs.noted(cut, figures | elsewhere(cut.report)),
            cut.branch_replacements(self.loaded),
            speedup=speedup,
            healing=cut.report,
            weights=cut.weights(),
        )

    def _candidates(self) -> tuple[list[Candidate], Speedup | None]:
        """The cut that reaches the goals; without goals ever larger ones.

        Each of these saves most for its damage. Where that begins with a large sublayer, the one of
        least damage is put before it: it may hold where no other does.
        """
        if self.goals:
            found, speedup = self._measured() if self._times_candidates else (self._solved(), None)
            return [Candidate(found, self.search.damage(found))], speedup
        assert self.settings.heal is not None
        half_s = time_of(self.settings.heal) / 2
        found_all = self._path(self._used_up, self._began + half_s)
        if not found_all:
            smallest = self.search.smallest(self._used_up)
            found_all = [Candidate(smallest, self.search.damage(smallest))]
        gentlest = Candidate(*self.search.gentlest(self._used_up))
        cheaper = cost_of(gentlest.damage, self.floors) < cost_of(found_all[0].damage, self.floors)
        return [gentlest, *found_all] if cheaper else found_all, None

    def _path(self, unit: Unit, until: float) -> list[Candidate]:
        """Ever larger cuts, as long as healing may bring them within the limits, and until then."""
        floors = self.floors

        def ends(step: Step) -> bool:
            late = time.monotonic() > until
            if late:
                self._progress.say("plan: the search ends here for want of time (--time)")
            return late or is_hopeless(damage_figures(step.damage), floors)

        with self._progress.task("search for ever larger cuts"):
            path = self.search.path(unit, ends)
        return [Candidate(*each) for each in path]

    def _in_reach(self, reached: Candidate, rung: Rung) -> str:
        """What of the goals the limits allow, by what healing made of the cut that reaches them."""
        floors, unit = self.floors, self.goals[0].unit
        remaining = max(0.0, rung.cost) / max(1e-6, cost_of(reached.damage, floors))
        allowed = [
            each.candidate
            for each in self._path(unit, time.monotonic() + SEARCH_S)
            if cost_of(each.damage, floors) * remaining + rung.high - rung.cost <= 1
        ]
        if not allowed:
            return "Within the limits on quality nothing is in reach. "
        gained = gains_of(max(allowed, key=lambda each: each.gain(unit)), self.goals)
        return f"Within the limits on quality, {gained} may be in reach. "

    def _chosen_plan(self, candidate: PlanCandidate) -> PruningPlan:
        """A plan of a candidate, with the text that has chosen it."""
        return self._plan_of(candidate).model_copy(update={"chosen_on": self._parts()["chosen_on"]})
