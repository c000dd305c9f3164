"""What reaches the goals of a budget: cuts that a search finds, and that are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from exporter.artifacts import CalibrationRef, PruningPlan, Speedup
from exporter.artifacts.plans.origin import parents_of
from exporter.choose.budgets.candidates import PlanCandidate
from exporter.choose.budgets.inputs import PlanInputs
from exporter.choose.budgets.judges import refuse_few_judges
from exporter.choose.budgets.refusals import refuse_nothing
from exporter.choose.budgets.search import Search
from exporter.choose.budgets.target_speedup import TOLERANCE, TimedCandidate, reach_speedup
from exporter.choose.budgets.units import Goal, Milliseconds, Unit, goals_of, unit_to_use_up
from exporter.models.texts.calibration import DEFAULT_LENGTH
from exporter.models.texts.mixtures import samples_of, specs_of


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
