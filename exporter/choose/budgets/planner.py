"""From what a user asks for to a plan: by scores, or by costs, fits, search, refit and a clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from exporter.artifacts import CalibrationRef, ParetoCurve, PruningPlan, Speedup
from exporter.artifacts.plans.by_score import check_counts, validate_plan
from exporter.artifacts.plans.origin import parents_of
from exporter.choose.budgets.candidates import PlanCandidate, damage_words
from exporter.choose.budgets.figures import (
    ENOUGH_NATS,
    Outcome,
    curve_of,
    damage_figures,
    elsewhere,
    healing_of,
    judged_apart,
    predicted,
)
from exporter.choose.budgets.inputs import PlanInputs
from exporter.choose.budgets.refusals import refuse_no_front, refuse_nothing
from exporter.choose.budgets.search import Search
from exporter.choose.budgets.target_speedup import TOLERANCE, TimedCandidate, reach_speedup
from exporter.choose.budgets.units import Goal, Milliseconds, goals_of, unit_to_use_up
from exporter.choose.selection.by_scores import one_shot, scored_again
from exporter.choose.selection.options import cut_of_options, objective_of
from exporter.choose.selection.refusals import refuse_counts
from exporter.choose.selection.task_items import judged_tasks, task_figures, task_results
from exporter.compare.tasks.scores import TaskScores
from exporter.heal.healed import heal
from exporter.heal.sequential import fit_sequential
from exporter.heal.texts import on_text_of
from exporter.models.ablation.branch_replacements import BranchReplacement
from exporter.models.ablation.meter import refuse_headless
from graph_passes.types import Replacement, SublayerRef


class Planner(PlanInputs):
    """Makes plans for one model, whatever is asked for; the only door to them."""

    def plan(self) -> Outcome:
        """The plan that holds the budget: by scores, or the one of least damage.

        Raises:
            PlanError: There is none; says what is reachable.
            UsageError: The budget asks for nothing, or the protection can't be read.
            DepthcutError: Of the stage that failed.
        """
        self.budget.refuse_empty()
        if self.budget.only_counts:
            check_counts(self.budget.counts)
        _ = self.task_files  # what can't be read is told before a model is loaded
        method = self.settings.search.search
        if method == "one-shot":
            found = Outcome(self._noted(self._lowest_scores()))
        elif method == "iterative":
            found = self._iterative()
        else:
            found = self._by_damage()
        validate_plan(
            found.plan,
            self.report.model.num_layers,
            model=self.report.model.source,
            allow_all=self._allow_all,
        )
        return self._healed(found) if self.settings.heals_afterwards else found

    def _lowest_scores(self) -> PruningPlan:
        return one_shot(
            self.report,
            self.budget.counts,
            self._protected,
            importance_sha256=self.importance_sha256,
            allow_all=self._allow_all,
            progress=self._progress,
        )

    def _iterative(self) -> Outcome:
        """Scored on all of the text, so what is measured there is measured where it was chosen."""
        self._refuse_unreachable()
        options = scored_again(
            self.loaded,
            self.report,
            self.text,
            self.budget.counts,
            self._protected,
            every=self.settings.search.every,
            batch_size=self.settings.batch_size,
            allow_all=self._allow_all,
            progress=self._progress,
        )
        chosen_on = {"chosen_on": self.text.parts}
        plan = self._plan_of(PlanCandidate(tuple(options))).model_copy(update=chosen_on)
        damage = self._searched_meter(self.text).measure_many(cut_of_options(options), [])[0]
        measured_on = self._measured_on(self.text)
        told = {
            "predicted": damage_figures(damage),
            "predicted_on": "searched",
            "judged_on": measured_on.parts,
            "judged_apart": judged_apart(damage, measured_on),
        }
        return Outcome(plan.model_copy(update=told), damage=damage)

    def _by_damage(self) -> Outcome:
        if self.budget.only_counts:
            self._refuse_unreachable()
        if self._given_sizes is not None:
            _ = self.goals  # what fits as it is needs no model
        _ = self.floors  # those of another kind of model are refused before the search
        candidate, speedup = self._measured() if self._times_candidates else (self._solved(), None)
        self._refuse_nothing(candidate)
        if speedup is None and self._stopwatch is not None:
            speedup = self._time(candidate)
        branch_replacements = self._refitted(candidate)
        return self._outcome(candidate, branch_replacements, speedup)

    def _healed(self, found: Outcome) -> Outcome:
        """The plan with what is fitted for it, by the same text as its scores."""
        assert self.settings.heal is not None
        healed = heal(
            self.loaded,
            found.plan,
            on_text_of(self.settings.heal, self.report.calibration, self.settings.calibration),
            made_from=found.plan.made_from,
            allow_all=self._allow_all,
            work=self._work.folder / "healing",
            progress=self._progress,
        )
        return Outcome(
            healed.plan,
            healed.branch_replacements,
            found.damage,
            found.speedup,
            healed.report,
            healed.weights,
        )

    def curve(self) -> ParetoCurve:
        """The whole front, up to plans that leave next to nothing of the model's answers.

        Raises:
            PlanError: There is no such plan.
        """
        refuse_headless(self.loaded.model)
        self.texts.refuse_short("a curve")
        unit = unit_to_use_up(self.budget, self.sizes, self.costs, self.settings.rank)
        with self._progress.task("search for the front"):
            candidates = self.search.path(unit, ENOUGH_NATS)
        if not candidates:
            refuse_no_front(self.checker, self.search.smallest(unit))
        return curve_of(
            candidates,
            self.reporter,
            self.sizes,
            self.costs,
            self.settings.rank,
            report=self.report,
            text=self.texts.reported,
        )

    def _refuse_unreachable(self) -> None:
        """Before the model is loaded."""
        refuse_counts(self.report, self.budget.counts, self._protected, allow_all=self._allow_all)

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
        unit = unit_to_use_up(self.budget, self.sizes, self.costs, self.settings.rank)
        with self._progress.task("search for the plan with the least damage"):
            return self.search.solve(self.goals if goals is None else goals, unit)

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

    def _refuse_nothing(self, candidate: PlanCandidate) -> None:
        if not candidate.options:
            unit = unit_to_use_up(self.budget, self.sizes, self.costs, self.settings.rank)
            refuse_nothing(self.checker, self.search.smallest(unit))

    def _refitted(self, candidate: PlanCandidate) -> Mapping[SublayerRef, BranchReplacement]:
        """The candidate's replacements, fitted again on the healed model where that is better."""
        choices: dict[SublayerRef, Replacement] = candidate.choices
        heal = self.settings.weighed
        if heal is None or all(replacement == "none" for replacement in choices.values()):
            return candidate.cut
        again = fit_sequential(
            self.loaded,
            self.texts.searched,
            choices,
            rank=heal.rank,
            ridge=heal.ridge,
            batch_size=self.settings.batch_size,
            progress=self._progress,
        )
        before, after = self.checker.damage(candidate), self.checker.damage_of(again)
        costs = objective_of(before, "perplexity"), objective_of(after, "perplexity")
        better = costs[1] < costs[0] and not self.checker.broken_by(after)
        self._progress.detail(
            f"plan: fitted one after the other: {damage_words(after)}, before "
            f"{damage_words(before)}{'' if better else '; not used'}"
        )
        return again if better else candidate.cut

    def _outcome(
        self,
        candidate: PlanCandidate,
        branch_replacements: Mapping[SublayerRef, BranchReplacement],
        speedup: Speedup | None,
    ) -> Outcome:
        damage = self.reporter.damage_of(branch_replacements)
        figures = predicted(
            self.budget,
            candidate,
            damage,
            self.sizes,
            self.costs,
            self.settings.rank,
            speedup,
        )
        healing = None
        if self.settings.weighed is not None:
            healing = healing_of(
                self.loaded,
                self.texts,
                branch_replacements,
                self.settings.weighed,
                batch_size=self.settings.batch_size,
                progress=self._progress,
            )
        judged = self._judged(branch_replacements)
        told = {
            "predicted": figures | elsewhere(healing) | (task_figures(judged) if judged else {}),
            "predicted_on": self.texts.figures_from,
            "predicted_tasks": task_results(judged),
            "judged_apart": judged_apart(damage, self.texts.reported),
            **self._parts(),
        }
        plan = self._plan_of(candidate).model_copy(update=told)
        return Outcome(plan, branch_replacements, damage, speedup, healing)

    def _judged(
        self, cut: Mapping[SublayerRef, BranchReplacement]
    ) -> list[tuple[TaskScores, TaskScores]]:
        """Both models' answers to the items that did not steer; none where texts decide."""
        if self.tasks is None:
            return []
        with self._progress.task("judge on the other items"):
            return judged_tasks(self.loaded, self.tasks, cut, self._progress)

    def _parts(self) -> dict[str, list[CalibrationRef]]:
        """What decided, as far as anything did: a plan without fits and floors needs no check."""
        texts, fits, tasks = self.texts, self.settings.weighed is not None, self.tasks
        steering = [] if tasks is None else [task.part for task in tasks.steering]
        judged = [] if tasks is None else [task.part for task in tasks.judged]
        return {
            "chosen_on": steering or self._measured_on(texts.searched).parts,
            "fitted_on": texts.searched.parts if fits else [],
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
