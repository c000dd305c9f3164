"""The largest cut that keeps limits on quality after healing, and what is said where none does."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NoReturn

from exporter.artifacts import CalibrationRef, PruningPlan, Speedup, TriedCut
from exporter.artifacts.base import TEXTS, Nouns, nouns_of
from exporter.artifacts.plans import parents_of
from exporter.choose.budgets.budget import USUAL_FLOORS, Floors
from exporter.choose.budgets.candidates import PlanCandidate, damage_words, percent
from exporter.choose.budgets.figures import Outcome, damage_figures, elsewhere, size_figures
from exporter.choose.budgets.inputs import PlanInputs
from exporter.choose.budgets.judges import refuse_few_judges
from exporter.choose.budgets.refusals import gains_of, refuse_nothing
from exporter.choose.budgets.search import Search
from exporter.choose.budgets.target_speedup import TOLERANCE, TimedCandidate, reach_speedup
from exporter.choose.budgets.trial_runs import (
    ENDS,
    HIGH,
    LOW,
    SAME,
    SHARES,
    Ladder,
    Rung,
    TrialRuns,
    is_hopeless,
    rung_of,
    time_of,
    trial_options,
)
from exporter.choose.budgets.units import Goal, Milliseconds, Unit, goals_of, unit_to_use_up
from exporter.choose.selection.by_scores import SEARCH_S
from exporter.choose.selection.options import Step
from exporter.compare.intervals import fewest_to_show
from exporter.errors import UndecidedGoalError, UnmetGoalError
from exporter.models.ablation.damage import SIMILARITY, AnyDamage
from exporter.models.texts.calibration import DEFAULT_LENGTH
from exporter.models.texts.mixtures import samples_of, specs_of
from exporter.printable import counted
from exporter.progress import QUIET, Progress
from graph_passes.types import Replacement


class Solving(PlanInputs):
    """Searches for the cut of least damage that reaches the goals."""

    @cached_property
    def search(self) -> Search:
        """Looks for candidates."""
        return Search(
            self._objective_meter(),
            self.checker,
            self.allowed.options,
            self.searching,
            self.allowed.prior,
            self.allowed.quality,
            self._allow_all,
            self._progress,
        )

    @cached_property
    def goals(self) -> list[Goal]:
        """What has to go."""
        return goals_of(self.budget, self.sizes, self.costs, self.settings.rank)

    def _solved(self, goals: Sequence[Goal] | None = None) -> PlanCandidate:
        with self._progress.task("search for the plan with the least damage"):
            return self.search.solve(self.goals if goals is None else goals, self._used_up)

    @property
    def _used_up(self) -> Unit:
        """What limits on quality are used up for."""
        return unit_to_use_up(self.budget, self.sizes, self.costs, self.settings.rank)

    @property
    def _times_candidates(self) -> bool:
        return self._stopwatch is not None and self.budget.target_speedup is not None

    def _measured(self) -> tuple[PlanCandidate, Speedup]:
        """Candidates are cut and measured until one is near the target speedup."""
        first, *others = self.goals
        assert isinstance(first.unit, Milliseconds)
        assert self.budget.target_speedup is not None
        found: TimedCandidate = reach_speedup(
            self.budget.target_speedup,
            first.amount,
            lambda goal_ms: self._solved([replace(first, amount=goal_ms), *others]),
            self._time,
            rounds=self.settings.rounds,
            progress=self._progress,
        )
        self._warn(found, self.budget.target_speedup)
        return found.candidate, found.speedup

    def _warn(self, found: TimedCandidate, target: float) -> None:
        """Tells of a target that was missed, or not shown to be hit."""
        low, high = found.speedup.ci95
        if found.miss(target) > TOLERANCE:
            self._progress.say(
                f"plan: warning: the chosen candidate is not within {TOLERANCE:.0%} of a "
                f"speedup of {target:g}: it measures {found.speedup.ratio:.3f}"
            )
        elif not found.is_shown(target):
            self._progress.say(
                f"plan: warning: a speedup within {TOLERANCE:.0%} of {target:g} is not proven: "
                f"the interval reaches from {low:.3f} to {high:.3f}; use a quieter machine or "
                "a larger --time-budget"
            )

    def _time(self, candidate: PlanCandidate) -> Speedup:
        assert self._stopwatch is not None
        return self._stopwatch.speedup(candidate)

    def _refuse_few_judges(self) -> None:
        """Refuses texts of which too few are left to show the limits, before they are read."""
        ref, settings = self.report.calibration, self.settings
        refuse_few_judges(
            self.budget,
            settings,
            self.loaded,
            settings.calibration or specs_of(ref),
            samples=samples_of(ref),
            sequence_length=ref.sequence_length or DEFAULT_LENGTH,
        )

    def _refuse_nothing(self, candidate: PlanCandidate) -> None:
        if not candidate.options:
            refuse_nothing(self.checker, self.search.smallest(self._used_up))

    def _parts(self) -> dict[str, list[CalibrationRef]]:
        """What decided, as far as anything did: a plan without fits and floors needs no check."""
        texts, fits, tasks = self.texts, self.settings.weighed is not None, self.tasks
        steering = [] if tasks is None else [task.part for task in tasks.steering]
        judged = [] if tasks is None else [task.part for task in tasks.judged]
        return {
            "chosen_on": steering or self._measured_on(texts.searched).parts,
            "fitted_on": self.fitted_text.parts if fits else [],
            "stopped_on": texts.checked.parts if fits or self.budget.floors else [],
            "judged_on": [*texts.reported.parts, *judged],
        }

    def _plan_of(self, candidate: PlanCandidate) -> PruningPlan:
        digest = self.importance_sha256
        return self._noted(
            PruningPlan(
                deletions=candidate.deletions,
                budget=self.budget.asked(),
                importance_sha256=digest,
                made_from=parents_of(self.report, digest),
            )
        )

    def _noted(self, plan: PruningPlan) -> PruningPlan:
        """The plan with how it was looked for."""
        settings = self.settings
        if settings.search.by_damage:
            settings = replace(settings, search=self.searching)
        return plan.model_copy(update={"budget": {**plan.budget, **settings.told()}})


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


@dataclass(frozen=True, eq=False)
class Candidate:
    """A cut that may be healed."""

    candidate: PlanCandidate
    damage: AnyDamage


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


class HealedLimits(Solving):
    """Plans whose limits on quality are those of the healed cut."""

    def _held_after_healing(self) -> Outcome:
        """The cut that reaches the goals, or the largest, that keeps the limits once healed."""
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
