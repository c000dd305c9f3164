"""From what a user asks for to a plan and its file: by scores, or by costs, fits, search, refit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from exporter.artifacts import CalibrationRef, ImportanceReport, PruningPlan, Speedup
from exporter.artifacts.base import nouns_of
from exporter.artifacts.plans import check_counts, keep_first, parents_of, validate_for
from exporter.artifacts.stacks import Stacks
from exporter.choose.budgets.budget import USUAL_FLOORS
from exporter.choose.budgets.candidates import PlanCandidate
from exporter.choose.budgets.figures import (
    Outcome,
    elsewhere,
    healing_of,
    judged_apart,
    size_figures,
)
from exporter.choose.budgets.inputs import COSTS, DAMAGES, PlanInputs
from exporter.choose.budgets.judges import Judges
from exporter.choose.budgets.limits import QualityLimits, Rung, damage_figures, is_hopeless
from exporter.choose.budgets.refusals import gains_of, refuse_more_than_scores, refuse_nothing
from exporter.choose.budgets.search import Search
from exporter.choose.budgets.settings import PlanRequest
from exporter.choose.budgets.target_speedup import Stopwatch, reach_speedup
from exporter.choose.budgets.trial_runs import (
    Candidate,
    TrialRuns,
    cost_of,
    largest_within,
    refuse_all,
    time_of,
    trial_options,
)
from exporter.choose.budgets.units import Goal, Unit, goals_of, unit_to_use_up, with_request
from exporter.choose.costs.table import CostTable
from exporter.choose.costs.timing import Effort
from exporter.choose.costs.weighing import sizes
from exporter.choose.selection.by_scores import SEARCH_S, affordable, one_shot
from exporter.choose.selection.greedy import greedy_in_stacks, settled_for_stacks
from exporter.choose.selection.meters import searched_meter
from exporter.choose.selection.options import Step, refuse_counts
from exporter.errors import ModelSourceError, PlanError
from exporter.files import refuse_overwriting, sha256_file
from exporter.heal.healed import heal
from exporter.heal.plan_file import refuse_places, write_healed_plan
from exporter.heal.texts import on_text_of
from exporter.models.loading.model_class import hub_off
from exporter.models.loading.model_source import TOO_LARGE, load_model
from exporter.progress import QUIET, Progress
from graph_passes.files.placing import SCRATCH, working


class Planner(PlanInputs):
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
            outcome = Outcome(self._noted(self._first_layers(self.budget.keep_first)))
        elif method == "one-shot":
            outcome = Outcome(self._noted(self._lowest_scores()))
        else:
            outcome = self._by_damage()
        validate_for(outcome.plan, self.report.model, allow_all=self._allow_all)
        done = self.settings.limits_healed(self.budget)
        return self._healed(outcome) if self.settings.heals_afterwards and not done else outcome

    def _of_stacks(self) -> Outcome:
        """Of an encoder-decoder: by scores, or by damage where that is asked for or affordable."""
        search = settled_for_stacks(self.settings.search, lambda: self.loaded, self._progress)
        if search.search == "one-shot":
            return Outcome(self._noted(self._lowest_scores()))
        stacks, text = Stacks.of(self.loaded.model.config), self.pairs
        options, damage = greedy_in_stacks(
            searched_meter(self.loaded, text, self.settings.batch_size, kept=self._work / DAMAGES),
            self.report,
            stacks,
            self.budget.counts,
            self._protected,
            search,
            allow_all=self._allow_all,
            progress=self._progress,
        )
        result = {
            "encoder_layers": stacks.encoder,
            "predicted": damage_figures(damage, text.clusters),
            "predicted_on": "searched",
            "chosen_on": text.parts,
        }
        plan = self._plan_of(PlanCandidate(tuple(options))).model_copy(update=result)
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
        kept = {ref for deletion in plan.deletions for ref in deletion.sublayers} & self._protected
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
        if self._given_sizes is not None:  # what fits as it is needs no model
            wanted = " and ".join(goal.words() for goal in self.goals)
            self._progress.detail(f"plan: wanted: {wanted or 'as much as the limits allow'}")
        if self.floors and self.settings.limits_healed(self.budget):
            return self._held_after_healing()
        candidate, speedup = self._reaching_goals()
        self._refuse_nothing(candidate)
        if speedup is None and self._stopwatch is not None:
            speedup = self._stopwatch.speedup(candidate)
        return self._outcome(candidate, speedup)

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
        return goals_of(self.budget, self.sizes, self.costs)

    @property
    def _used_up(self) -> Unit:
        """What limits on quality are used up for."""
        return unit_to_use_up(self.budget, self.sizes, self.costs)

    def _solved(self, goals: Sequence[Goal]) -> PlanCandidate:
        with self._progress.task("search for the plan with the least damage"):
            return self.search.solve(goals, self._used_up)

    def _reaching_goals(self) -> tuple[PlanCandidate, Speedup | None]:
        """For a target speedup candidates are cut and timed until one is near it."""
        target, stopwatch = self.budget.target_speedup, self._stopwatch
        if target is None or stopwatch is None:
            return self._solved(self.goals), None
        first, *others = self.goals
        candidate = reach_speedup(
            target,
            first.amount,
            lambda goal_ms: self._solved([replace(first, amount=goal_ms), *others]),
            stopwatch.speedup,
            rounds=self.settings.rounds,
            progress=self._progress,
        )
        return candidate.candidate, candidate.speedup

    def _refuse_nothing(self, candidate: PlanCandidate) -> None:
        if not candidate.options:
            refuse_nothing(self.checker, self.search.smallest(self._used_up))

    def _held_after_healing(self) -> Outcome:
        """The cut that reaches the goals, or the largest, that keeps the limits once healed."""
        assert self.settings.heal is not None
        runs = TrialRuns(
            self.loaded,
            trial_options(self.settings.heal, self.report.calibration, self.settings.calibration),
            self.floors,
            self._work / "trials",
            [*self.report.calibration.texts, *self._parts()["chosen_on"]],
            self._progress,
        )
        if Judges.of(self.floors, self.loaded.model).fewest:  # too few are told before a search
            self._progress.detail(f"plan: judged on {runs.judging.part.describe()}")
        candidates, speedup = self._candidates()
        self._refuse_nothing(candidates[0][0])
        limits = QualityLimits(
            self.floors,
            nouns_of(self.loaded.ref.architecture),
            usual=self.budget.floors == USUAL_FLOORS,
        )
        runs.begin(time.monotonic() - self._began)
        ladder = largest_within(candidates, limits, runs, self._chosen_plan, self._progress)
        if ladder.best is None:
            reach = self._in_reach(candidates[0], ladder.tried[0]) if self.goals else ""
            smaller = min(rung.number for rung in ladder.tried) > 0
            gains = [candidates[rung.number][0].gain(self._used_up) for rung in ladder.tried]
            gained = [self._used_up.words(gain) for gain in gains]
            tried = [healed_cut.tried for healed_cut in runs.cuts]
            refuse_all(tried, limits, self.goals, reach, smaller, gained)
        candidate, _ = candidates[ladder.best.number]
        cut = runs.cuts[ladder.tried.index(ladder.best)]
        figures = size_figures(self.budget, candidate, self.sizes, self.costs, speedup)
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
            candidate, speedup = self._reaching_goals()
            return [(candidate, self.search.damage(candidate))], speedup
        assert self.settings.heal is not None
        path = self._path(self._used_up, self._began + time_of(self.settings.heal) / 2)
        if not path:
            smallest = self.search.smallest(self._used_up)
            path = [(smallest, self.search.damage(smallest))]
        gentlest = self.search.gentlest(self._used_up)
        cheaper = cost_of(gentlest[1], self.floors) < cost_of(path[0][1], self.floors)
        return [gentlest, *path] if cheaper else path, None

    def _path(self, unit: Unit, until: float) -> list[Candidate]:
        """Ever larger cuts, as long as healing may bring them within the limits, and until then."""

        def ends(step: Step) -> bool:
            late = time.monotonic() > until
            if late:
                self._progress.say("plan: the search ends here; more time may find larger cuts")
            return late or is_hopeless(damage_figures(step.damage), self.floors)

        with self._progress.task("search for ever larger cuts"):
            return self.search.path(unit, ends)

    def _in_reach(self, reached: Candidate, rung: Rung) -> str:
        """What of the goals the limits allow, by what healing made of the cut that reaches them."""
        unit = self.goals[0].unit
        remaining = max(0.0, rung.cost) / max(1e-6, cost_of(reached[1], self.floors))
        allowed = [
            candidate
            for candidate, damage in self._path(unit, time.monotonic() + SEARCH_S)
            if cost_of(damage, self.floors) * remaining + rung.high - rung.cost <= 1
        ]
        if not allowed:
            return "Within the limits on quality nothing is in reach. "
        gained = gains_of(max(allowed, key=lambda item: item.gain(unit)), self.goals)
        return f"Within the limits on quality, {gained} may be in reach. "

    def _chosen_plan(self, candidate: PlanCandidate) -> PruningPlan:
        """A plan of a candidate, with the text that has chosen it."""
        return self._plan_of(candidate).model_copy(update={"chosen_on": self._parts()["chosen_on"]})

    def _parts(self) -> dict[str, list[CalibrationRef]]:
        """What decided, as far as anything did: a plan without fits and floors needs no check."""
        texts, fits = self.texts, self.settings.weighed is not None
        return {
            "chosen_on": self._measured_on(texts.searched).parts,
            "fitted_on": self.fitted_text.parts if fits else [],
            "stopped_on": texts.checked.parts if fits or self.budget.floors else [],
            "judged_on": texts.reported.parts,
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

    def _healed(self, outcome: Outcome) -> Outcome:
        """The plan with what is fitted for it, by the same text as its scores."""
        assert self.settings.heal is not None
        healed = heal(
            self.loaded,
            outcome.plan,
            on_text_of(self.settings.heal, self.report.calibration, self.settings.calibration),
            made_from=outcome.plan.made_from,
            allow_all=self._allow_all,
            work=self._work / "healing",
            progress=self._progress,
        )
        return Outcome(
            healed.plan,
            healed.branch_replacements,
            outcome.damage,
            outcome.speedup,
            healed.report,
            healed.weights,
        )

    def _outcome(
        self,
        candidate: PlanCandidate,
        speedup: Speedup | None,
    ) -> Outcome:
        branch_replacements = candidate.cut
        damage = self.reporter.damage_of(branch_replacements)
        figures = damage_figures(damage, self.texts.reported.clusters) | size_figures(
            self.budget, candidate, self.sizes, self.costs, speedup
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
        result = {
            "predicted": figures | elsewhere(healing),
            "predicted_on": self.texts.figures_from,
            "judged_apart": judged_apart(damage, self.texts.reported),
            **self._parts(),
        }
        plan = self._plan_of(candidate).model_copy(update=result)
        return Outcome(plan, branch_replacements, damage, speedup, healing)


def make_plan(request: PlanRequest, progress: Progress = QUIET) -> PruningPlan:
    """Makes the plan that is asked for, and writes it.

    Args:
        request: The scores' file, and the budget: numbers of sublayers, or limits on damage, size
            or time; what is measured is kept beside the output for the next call.
        progress: Hears of each step.

    Raises:
        PlanError: The budget can't be met, or nothing can go.
        UsageError: The request contradicts itself.
    """
    report = ImportanceReport.read(request.importance).of_metric(request.metric)
    _refuse_places(request, report)
    weighs = request.settings.for_budget(request.budget).weighs_replacements
    keeps = not request.budget.only_counts or weighs
    with working(request.output, forget=not keeps) as kept:
        planner = _planner(request, report, kept, progress)
        made = _write_plan(request, report, planner, progress)
        if keeps and kept.exists():
            progress.say(f"plan: what was measured and timed is kept for the next call: {kept}")
    return made


def _refuse_places(request: PlanRequest, report: ImportanceReport) -> None:
    """Refuses what would be written over an input, or beside a model's weights."""
    texts, model = request.settings.calibration, request.model
    inputs = [request.importance, *map(Path, filter(None, (*texts, model)))]
    inputs += [request.onnx] if request.onnx is not None else []
    places = {request.output: "pruning_plan", request.costs: "cost_table"}
    for written, kind in places.items():
        if written is not None:
            refuse_overwriting(written, inputs, kind)
    if request.settings.heal is None and request.budget.only_counts:
        return  # a bare plan is one file
    inputs += [request.costs] if request.costs is not None else []
    folder = Path(model or report.model.source)
    read = [path for path in inputs if model is None or path != Path(model)]
    refuse_places(request.output, read, folder)


def _write_plan(
    request: PlanRequest, report: ImportanceReport, planner: Planner, progress: Progress
) -> PruningPlan:
    outcome = planner.plan()
    result = {} if request.metric is None else {"metric": report.metric}
    noted = outcome.plan.model_copy(update={"budget": {**outcome.plan.budget, **result}})
    # Takes along what an earlier plan had beside it.
    made = write_healed_plan(
        request.output,
        noted,
        outcome.branch_replacements,
        weights=outcome.weights,
        report=outcome.healing,
    )
    if words := outcome.words():
        progress.say(f"plan: {words}")
    return made


def _planner(
    request: PlanRequest,
    report: ImportanceReport,
    work: Path,
    progress: Progress,
) -> Planner:
    weighed = None if request.onnx is None else sizes(request.onnx)
    budget = with_request(request.budget, weighed, progress)
    stopwatch = None
    if request.onnx is not None and budget.at is not None:
        stopwatch = Stopwatch(
            request.onnx,
            budget.at,
            request.costs or work / COSTS,
            work / SCRATCH,
            provider=request.run.provider,
            threads=request.run.threads,
            may_replace=request.costs is None,  # a file that was named is nobody's memory
            variants=Effort(seconds=request.time_budget_s),
            candidates=Effort(seconds=2 * request.time_budget_s),
            together=budget.target_speedup is None,
            progress=progress,
        )
    known = request.costs if stopwatch is None else None
    return Planner(
        report,
        lambda: _model(request, report.model.source, progress),
        budget,
        request.settings,
        work=work,
        sizes=weighed,
        stopwatch=stopwatch,
        costs=None if known is None else CostTable.read(known),
        importance_sha256=sha256_file(request.importance),
        progress=progress,
    )


def _model(request: PlanRequest, source: str, progress: Progress) -> Any:
    """Loads the model; only the user can ask the network for the one that the scores name."""
    if request.model is not None:
        with progress.task(f"load {request.model}"):
            return load_model(request.model, **vars(request.load))
    try:
        with progress.task(f"load {source}"), hub_off():
            return load_model(source, **vars(request.load))
    except ModelSourceError as error:
        if Path(source).exists() or error.code == TOO_LARGE:
            raise
        raise ModelSourceError(
            f"The model {source}, which {request.importance} names, is not on this machine.",
            "Give it with --model to fetch it.",
        ) from error
