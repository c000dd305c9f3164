"""From what a user asks for to a plan and its file: by scores, by damage, or once healed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.artifacts import ImportanceReport, PruningPlan, Speedup
from exporter.artifacts.plans import keep_first, parents_of, validate_for
from exporter.choose.budgets.budget import Budget, SearchOptions
from exporter.choose.budgets.by_scores import affordable, lowest_scores
from exporter.choose.budgets.figures import (
    Outcome,
    elsewhere,
    healing_of,
    judged_apart,
    size_figures,
)
from exporter.choose.budgets.greedy import Search
from exporter.choose.budgets.inputs import PlanInputs
from exporter.choose.budgets.limits import QualityCheck, damage_figures
from exporter.choose.budgets.options import (
    Goal,
    PlanCandidate,
    groups_of,
    number_goals,
    options_for,
    prior_of,
    refuse_counts,
    refuse_number,
    words_of,
)
from exporter.choose.budgets.settings import PlanRequest
from exporter.choose.budgets.target_speedup import reach_speedup, timed_on
from exporter.choose.budgets.trial_runs import held_after_healing
from exporter.choose.costs.measuring import Effort
from exporter.choose.costs.table import CostTable
from exporter.errors import ModelSourceError, PlanError
from exporter.files import refuse_overwriting, sha256_file
from exporter.heal.healed import heal
from exporter.heal.plan_file import refuse_places, write_healed_plan
from exporter.heal.texts import on_text_of
from exporter.models.loading.model_class import hub_off
from exporter.models.loading.model_source import TOO_LARGE, load_model
from exporter.options import is_given
from exporter.progress import QUIET, Progress
from graph_passes.files.placing import working
from graph_passes.types import BLOCK_KINDS


def make(inputs: PlanInputs) -> Outcome:
    """The plan that holds the budget: by scores, or the one of least damage."""
    budget, model = inputs.budget, inputs.report.model
    budget.refuse_empty()
    if model.encoder_layers is not None:
        refuse_more_than_scores(budget, inputs.settings.search)
        return _of_stacks(inputs)
    if budget.cross_attention:
        refuse_number("cross_attention", budget.cross_attention, 0, model.source)
    if inputs.settings.search.search == "auto":
        inputs.settings = replace(inputs.settings, search=affordable(inputs))
    if budget.keep_first is not None:
        outcome = Outcome(_noted(inputs, _first_layers(inputs, budget.keep_first)))
    elif inputs.settings.search.search == "one-shot":
        outcome = Outcome(_noted(inputs, lowest_scores(inputs)))
    else:
        outcome = _by_damage(inputs)
    validate_for(outcome.plan, model, allow_all=inputs.allow_all)
    done = inputs.settings.limits_healed(budget)
    return _healed(inputs, outcome) if inputs.settings.heals_afterwards and not done else outcome


def refuse_more_than_scores(budget: Budget, search: SearchOptions) -> None:
    """Refuses what an encoder-decoder can't be planned by: more than numbers, other searches."""
    others = (
        not budget.only_counts or budget.keep_first or budget.at or budget.kinds != BLOCK_KINDS,
        is_given(search, "tokens"),
        search.kept_small not in ("kl", "perplexity"),
    )
    if any(others):
        raise PlanError(
            "Encoder-decoders are planned by numbers of sublayers alone, by their answers to all "
            "pairs that the scores rest on.",
            "Give --drop-attn, --drop-cross, --drop-mlp, --drop-block or --drop-joint, and of the "
            "searches' options --objective kl or perplexity.",
            code="numbers-only",
        )


AFFORDABLE = 150_000_000
"""Parameters up to which damage to pairs is measured where nobody asks for it: minutes."""


def _of_stacks(inputs: PlanInputs) -> Outcome:
    """Of an encoder-decoder: by scores, or by damage where that is asked for or affordable."""
    report, how = inputs.report, inputs.settings.search.search
    if how == "auto":
        small = inputs.loaded.model.num_parameters() <= AFFORDABLE
        how = "greedy" if small else "one-shot"
        by = "measured damage, on the pairs that the scores rest on"
        by = by if small else "scores; measuring the damage would take too long here"
        inputs.progress.say(f"plan: chosen by {by}")
    if how == "one-shot":
        return Outcome(_noted(inputs, lowest_scores(inputs)))
    counts, protected, stacks = inputs.budget.counts, inputs.protected, inputs.stacks
    refuse_counts(report, counts, protected, allow_all=inputs.allow_all)
    options = [o for group, _ in groups_of(counts) for o in options_for(group, stacks, protected)]
    meter = inputs.objective_meter()
    check, prior = QualityCheck(meter), prior_of(report, options)
    how_far, rest = inputs.searching, (inputs.allow_all, inputs.progress)
    search = Search(meter, check, options, how_far, prior, *rest)
    goals = number_goals(inputs.budget)
    candidate = search.solve(goals, goals[0].unit)
    damage = search.damage(candidate)
    result = {
        "encoder_layers": stacks.encoder,
        "predicted": damage_figures(damage, inputs.pairs.clusters),
        "predicted_on": "searched",
        "chosen_on": inputs.pairs.parts,
    }
    plan = _plan_of(inputs, candidate).model_copy(update=result)
    validate_for(plan, report.model, allow_all=inputs.allow_all)
    return Outcome(plan, damage=damage)


def _first_layers(inputs: PlanInputs, number: int) -> PruningPlan:
    plan = keep_first(inputs.report, number, importance_sha256=inputs.importance_sha256)
    dropped = {ref for deletion in plan.deletions for ref in deletion.sublayers}
    if kept := dropped & inputs.protected:
        layer, kind = min(kept)
        raise PlanError(
            f"--keep-first {number} drops {kind} {layer}, which --protect keeps.",
            "Leave one of them out.",
            code="options-clash",
        )
    return plan


def _by_damage(inputs: PlanInputs) -> Outcome:
    budget = inputs.budget
    if budget.only_counts:
        counts, protected = budget.counts, inputs.protected
        refuse_counts(inputs.report, counts, protected, allow_all=inputs.allow_all)
    if inputs.given_sizes is not None:  # what fits as it is needs no model
        wanted = words_of(inputs.goals) or "as much as the limits allow"
        inputs.progress.detail(f"plan: wanted: {wanted}")
    if inputs.floors and inputs.settings.limits_healed(budget):
        chosen_on = {"chosen_on": inputs.measured_text.parts}
        return held_after_healing(
            inputs,
            lambda: _reaching_goals(inputs),
            lambda candidate: _plan_of(inputs, candidate).model_copy(update=chosen_on),
        )
    candidate, speedup = _reaching_goals(inputs)
    if not candidate.options:
        inputs.search.refuse_nothing(inputs.used_up)
    if speedup is None and (stopwatch := inputs.stopwatch) is not None:
        speedup = stopwatch.speedup(candidate)
    return _outcome(inputs, candidate, speedup)


def _reaching_goals(inputs: PlanInputs) -> tuple[PlanCandidate, Speedup | None]:
    """For a target speedup candidates are cut and timed until one is near it."""

    def solved(goals: list[Goal]) -> PlanCandidate:
        with inputs.progress.task("search for the plan with the least damage"):
            return inputs.search.solve(goals, inputs.used_up)

    goals, target = inputs.goals, inputs.budget.target_speedup
    if target is None or (stopwatch := inputs.stopwatch) is None:
        return solved(goals), None
    first, *others = goals
    timed = reach_speedup(
        target,
        first.amount,
        lambda goal_ms: solved([replace(first, amount=goal_ms), *others]),
        stopwatch.speedup,
        progress=inputs.progress,
    )
    return timed.candidate, timed.speedup


def _plan_of(inputs: PlanInputs, candidate: PlanCandidate) -> PruningPlan:
    digest = inputs.importance_sha256
    plan = PruningPlan(
        deletions=candidate.deletions,
        budget=inputs.budget.asked(),
        importance_sha256=digest,
        made_from=parents_of(inputs.report, digest),
    )
    return _noted(inputs, plan)


def _noted(inputs: PlanInputs, plan: PruningPlan) -> PruningPlan:
    """The plan with how it was looked for."""
    settings = inputs.settings
    if settings.search.by_damage:
        settings = replace(settings, search=inputs.searching)
    return plan.model_copy(update={"budget": {**plan.budget, **settings.told()}})


def _healed(inputs: PlanInputs, outcome: Outcome) -> Outcome:
    """The plan with what is fitted for it, by the same text as its scores."""
    settings = inputs.settings
    assert settings.heal is not None
    healed = heal(
        inputs.loaded,
        outcome.plan,
        on_text_of(settings.heal, inputs.report.calibration, settings.calibration),
        made_from=outcome.plan.made_from,
        allow_all=inputs.allow_all,
        work=inputs.work / "healing",
        progress=inputs.progress,
    )
    return replace(
        outcome,
        plan=healed.plan,
        branch_replacements=healed.branch_replacements,
        healing=healed.report,
        weights=healed.weights,
    )


def _outcome(inputs: PlanInputs, candidate: PlanCandidate, speedup: Speedup | None) -> Outcome:
    """The plan with its figures on tokens on which nothing was decided."""
    texts, settings = inputs.texts, inputs.settings
    damage, healing = inputs.reporter.damage_of(candidate.cut), None
    weighed = settings.weighed
    if weighed is not None and not settings.heals_afterwards:
        healing = healing_of(inputs, candidate, weighed)
    figures = damage_figures(damage, texts.reported.clusters)
    figures |= size_figures(inputs, candidate, speedup)
    result = {
        "predicted": figures | elsewhere(healing),
        "predicted_on": texts.figures_from,
        "judged_apart": judged_apart(damage, texts.reported),
        # What decided, as far as anything did: without fits and floors nothing needs a check.
        "chosen_on": inputs.measured_text.parts,
        "fitted_on": inputs.fitted_text.parts if weighed is not None else [],
        "stopped_on": texts.checked.parts if weighed is not None or inputs.budget.floors else [],
        "judged_on": texts.reported.parts,
    }
    plan = _plan_of(inputs, candidate).model_copy(update=result)
    return Outcome(plan, candidate.cut, damage, speedup, healing)


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
        outcome = make(_inputs(request, report, kept, progress))
        plan = write_outcome(outcome, request.output, request.metric and report.metric, progress)
        if keeps and kept.exists():
            progress.say(f"plan: what was measured and timed is kept for the next call: {kept}")
    return plan


def write_outcome(
    outcome: Outcome, path: Path, metric: str | None = None, progress: Progress = QUIET
) -> PruningPlan:
    """Writes a plan with what stands beside it, in place of what an earlier one had there."""
    noted = {} if metric is None else {"metric": metric}
    plan = write_healed_plan(
        path,
        outcome.plan.model_copy(update={"budget": {**outcome.plan.budget, **noted}}),
        outcome.branch_replacements,
        weights=outcome.weights,
        report=outcome.healing,
    )
    if words := outcome.words():
        progress.say(f"plan: {words}")
    return plan


def _refuse_places(request: PlanRequest, report: ImportanceReport) -> None:
    """Refuses what would be written over an input, or beside a model's weights."""
    texts, model = request.settings.calibration, request.model
    inputs = [request.importance, *map(Path, filter(None, (*texts, model)))]
    inputs += [request.onnx] if request.onnx is not None else []
    inputs += [request.costs] if request.costs is not None else []
    refuse_overwriting(request.output, inputs, "pruning_plan")
    if request.settings.heal is None and request.budget.only_counts:
        return  # a bare plan is one file
    folder = Path(model or report.model.source)
    read = [path for path in inputs if model is None or path != Path(model)]
    refuse_places(request.output, read, folder)


def _inputs(
    request: PlanRequest, report: ImportanceReport, work: Path, progress: Progress
) -> PlanInputs:
    budget, weighed, stopwatch = request.budget, None, None
    if request.onnx is not None:
        run, effort = request.run, Effort(seconds=2 * request.time_budget_s)
        on = run.provider, run.threads
        budget, weighed, stopwatch = timed_on(request.onnx, budget, work, on, effort, progress)
    return PlanInputs(
        report,
        lambda: _model(request, report.model.source, progress),
        budget,
        request.settings,
        work=work,
        sizes=weighed,
        stopwatch=stopwatch,
        costs=None if request.costs is None else CostTable.read(request.costs),
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
