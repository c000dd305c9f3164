"""From what a user asks for to a plan: by scores, or by costs, fits, search, refit and a clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from exporter.artifacts import PruningPlan, Speedup
from exporter.artifacts.plans import check_counts, keep_first, validate_for
from exporter.artifacts.stacks import Stacks
from exporter.choose.budgets.candidates import PlanCandidate, damage_words
from exporter.choose.budgets.figures import (
    Outcome,
    damage_figures,
    elsewhere,
    healing_of,
    judged_apart,
    size_figures,
)
from exporter.choose.budgets.healed_limits import HealedLimits
from exporter.choose.budgets.refusals import refuse_more_than_scores
from exporter.choose.selection.by_scores import affordable, one_shot
from exporter.choose.selection.greedy import greedy_in_stacks, settled_for_stacks
from exporter.choose.selection.meters import searched_meter
from exporter.choose.selection.options import objective_of, refuse_counts
from exporter.choose.selection.task_items import judged_tasks, task_figures, task_results
from exporter.compare.tasks.items import TaskScores
from exporter.errors import PlanError
from exporter.heal.fitting import fit_sequential
from exporter.heal.healed import heal
from exporter.heal.texts import on_text_of
from exporter.models.ablation.branch_replacements import BranchReplacement
from graph_passes.types import Replacement, SublayerRef


class Planner(HealedLimits):
    """Makes plans for one model, whatever is asked for; the only door to them."""

    def plan(self) -> Outcome:
        """The plan that holds the budget: by scores, or the one of least damage."""
        self.budget.refuse_empty()
        if self.report.model.encoder_layers is None and self.budget.cross_attention:
            raise PlanError(
                f"{self.report.model.source} has no cross-attention: it is no encoder-decoder.",
                "Leave --drop-cross out.",
                code="no-cross-attention",
            )
        if self.report.model.encoder_layers is not None:
            refuse_more_than_scores(self.budget, self.settings.search)
        if self.budget.only_counts and self.budget.keep_first is None:
            check_counts(self.budget.counts)
        _ = self.task_files  # what can't be read is told before a model is loaded
        if self.report.model.encoder_layers is not None:
            return self._of_stacks()
        if self.settings.search.search == "auto":
            self.settings = replace(
                self.settings,
                search=affordable(
                    self.settings.search,
                    self.report,
                    self.budget.counts if self.budget.only_counts else {},
                    self.loaded.model,
                    allow_all=self._allow_all,
                    progress=self._progress,
                ),
            )
        method = self.settings.search.search
        if self.budget.keep_first is not None:
            found = Outcome(self._noted(self._first_layers(self.budget.keep_first)))
        elif method == "one-shot":
            found = Outcome(self._noted(self._lowest_scores()))
        else:
            found = self._by_damage()
        validate_for(found.plan, self.report.model, allow_all=self._allow_all)
        done = self.settings.limits_healed(self.budget)
        return self._healed(found) if self.settings.heals_afterwards and not done else found

    def _of_stacks(self) -> Outcome:
        """Of an encoder-decoder: by scores, or by damage where that is asked for or affordable."""
        search = settled_for_stacks(self.settings.search, lambda: self.loaded, self._progress)
        if search.search == "one-shot":
            return Outcome(self._noted(self._lowest_scores()))
        stacks, text = Stacks.of(self.loaded.model.config), self.pairs
        options, damage = greedy_in_stacks(
            searched_meter(self.loaded, text, self.settings.batch_size, kept=self._work.journal),
            self.report,
            stacks,
            self.budget.counts,
            self._protected,
            search,
            allow_all=self._allow_all,
            progress=self._progress,
        )
        told = {
            "encoder_layers": stacks.encoder,
            "predicted": damage_figures(damage, text.clusters),
            "predicted_on": "searched",
            "chosen_on": text.parts,
        }
        plan = self._plan_of(PlanCandidate(tuple(options))).model_copy(update=told)
        validate_for(plan, self.report.model, allow_all=self._allow_all)
        return Outcome(plan, damage=damage)

    def _lowest_scores(self) -> PruningPlan:
        return one_shot(
            self.report,
            self.budget.counts,
            self._protected,
            importance_sha256=self.importance_sha256,
            allow_all=self._allow_all,
            progress=self._progress,
        )

    def _first_layers(self, number: int) -> PruningPlan:
        plan = keep_first(self.report, number, importance_sha256=self.importance_sha256)
        kept = {ref for each in plan.deletions for ref in each.sublayers} & self._protected
        if kept:
            layer, kind = min(kept)
            raise PlanError(
                f"--keep-first {number} drops {kind} {layer}, which --protect keeps.",
                "Leave one of them out.",
                code="protected",
            )
        return plan

    def _by_damage(self) -> Outcome:
        if self.budget.only_counts:
            counts, protected = self.budget.counts, self._protected
            refuse_counts(self.report, counts, protected, allow_all=self._allow_all)
        if self._given_sizes is not None:
            _ = self.goals  # what fits as it is needs no model
        _ = self.floors  # those of another kind of model are refused before the search
        if self.floors:
            _ = self.searching
            self._refuse_few_judges()  # before minutes of search
        if self.settings.limits_healed(self.budget):
            return self._held_after_healing()
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

    def _refitted(self, candidate: PlanCandidate) -> Mapping[SublayerRef, BranchReplacement]:
        """The candidate's replacements, fitted again on the healed model where that is better."""
        choices: dict[SublayerRef, Replacement] = candidate.choices
        heal = self.settings.weighed
        idle = heal is None or all(replacement == "none" for replacement in choices.values())
        if heal is None or idle or self.settings.heals_afterwards:
            return candidate.cut
        again = fit_sequential(
            self.loaded,
            self.fitted_text,
            choices,
            rank=heal.rank,
            ridge=heal.ridge,
            intercept=heal.intercept,
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
        figures = damage_figures(damage, self.texts.reported.clusters) | size_figures(
            self.budget, candidate, self.sizes, self.costs, self.settings.rank, speedup
        )
        healing = None
        weighed = self.settings.weighed
        if weighed is not None and not self.settings.heals_afterwards:
            healing = healing_of(
                self.loaded,
                (self.fitted_text, self.texts.reported),
                branch_replacements,
                weighed,
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
