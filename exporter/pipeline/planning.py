"""The stages of `depthcut export` that choose what to drop, or take a plan, and heal it."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

from exporter.artifacts import PruningPlan
from exporter.artifacts.base import nouns_of
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.artifacts.plan_figures import kind_of
from exporter.artifacts.plans import is_foreign_plan, validate_plan
from exporter.artifacts.servers import refuse_unheld
from exporter.artifacts.store import FOLDER, key_hash
from exporter.choose.budgets.budget import Budget
from exporter.choose.budgets.inputs import PlanInputs
from exporter.choose.budgets.planner import make, write_outcome
from exporter.choose.budgets.settings import PlanSettings
from exporter.choose.budgets.target_speedup import timed_on
from exporter.choose.costs.measuring import Effort
from exporter.cut.branch_replacements import branch_replacements_of
from exporter.engines.environment import default_threads, gpu_name, processor_name
from exporter.errors import PlanError, UnmetGoalError
from exporter.files import sha256_file
from exporter.heal.healed import heal as heal_plan
from exporter.heal.plan_file import files_of, report_of
from exporter.heal.texts import texts_of_pairs
from exporter.models.residual_stream import together_in
from exporter.models.texts.pairs import PAIRS, scored_pairs
from exporter.pipeline.run import HEALING, Key, Run, file_hash, text_hashes
from exporter.processes import available_bytes
from exporter.report.sections.healing import healing_words
from graph_passes.files.placing import remove_tree
from graph_passes.files.reading import copy_file

_PLACE, _FITS = "planning", "healing-fits"
_BESIDE = 2
"""Times a graph's weights in memory while it is timed, beside the model in PyTorch."""


def plan_key(run: Run) -> Key:
    """What is asked for, or the plan that was given."""
    request, budget, given = run.request, run.request.drops.budget, run.given_plan
    timed = budget is not None and budget.at is not None
    return {
        "given": None if given is None else given_plan_hash(given),
        "budget": None if budget is None else asdict(budget),
        "settings": None if budget is None else asdict(_settings(run, budget)),
        "provider": request.compare.provider if timed else None,
        "threads": request.compare.threads if timed else None,
        "machine": [processor_name(), default_threads(), gpu_name()] if timed else None,
    }


def given_plan_hash(given: LoadedPlan) -> str:
    """Of a plan's file, its numbers, and what is known of their gain."""
    report = _healing_report(given)
    return key_hash({**given.hashes, "report": None if report is None else sha256_file(report)})


def _healing_report(given: LoadedPlan) -> Path | None:
    return None if given.path is None else report_of(given.plan, given.path)


def plan(run: Run, folder: Path) -> None:
    """Chooses what to drop, or takes the plan that was given, with its replacements."""
    budget, given, path = run.request.drops.budget, run.given_plan, folder / "plan.json"
    if given is not None:
        _take(run, given, path)
    else:
        assert budget is not None
        _choose(run, budget, path)


def _take(run: Run, given: LoadedPlan, path: Path) -> None:
    """A copy of the user's own plan, to the letter, with what stands beside it."""
    assert given.path is not None
    run.progress.say("plan: drop " + given.plan.describe())
    if is_foreign_plan(given.path):
        given.plan.write(path)
        return
    copies = {given.path: path}
    if given.replacements is not None and given.plan.replacements is not None:
        branch_replacements_of(given.plan.deletions, given.replacements, run.choosing.model)
        copies[given.replacements.path] = path.parent / given.plan.replacements.path
    report = _healing_report(given)
    if report is not None:
        copies[report] = files_of(path)[2]
    for source, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy_file(source, copy, named=source == given.path)


def check_plan(run: Run, plan: LoadedPlan) -> None:
    """Holds a plan against the model, also where an earlier run made it, with --allow-empty."""
    if run.request.stream and plan.changed_weights:
        raise PlanError(
            "The plan changes weights, and this model's weights are read a layer at a time.",
            "Leave --stream out.",
            code="changed-weights",
        )
    validate_plan(
        plan.plan,
        run.num_layers,
        encoder_layers=run.encoder_layers,
        model=run.request.source,
        path=run.request.drops.plan,
        allow_all=run.request.allow_empty,
    )
    if run.request.server is not None:
        refuse_unheld([run.request.server], plan.plan.deletions)
    if not run.request.heals_plan:  # healing holds it against the model itself
        plan.hold_against(run.source_sha256, run.request.source, run.progress)


def _choose(run: Run, budget: Budget, path: Path) -> None:
    """Plans what holds a budget, on the exported baseline where its sizes or times matter.

    Costs and damages are kept in the output folder's memory, where an interrupted run finds them.
    """
    work = run.request.out / FOLDER / _PLACE
    weighed = stopwatch = None
    if run.request.plans_on_graph:
        graph, compare = run.ledger.path("baseline") / "model.onnx", run.request.compare
        effort = Effort(seconds=2 * compare.timing.time_budget_s, rounds=compare.rounds)
        on = compare.provider, compare.threads
        budget, weighed, stopwatch = timed_on(graph, budget, work, on, effort, run.progress)
        beside = _BESIDE * weighed.weight_bytes
        if stopwatch is not None and (available_bytes() or 0) < beside:
            run.free_model()  # costs are measured first
    settings = _settings(run, budget)
    inputs = PlanInputs(
        run.importance,
        lambda: run.choosing,
        budget,
        settings,
        work=work,
        sizes=weighed,
        stopwatch=stopwatch,
        importance_sha256=sha256_file(run.ledger.path("importance.json")),
        progress=run.progress,
    )
    plan = write_outcome(make(inputs), path, progress=run.progress)
    if budget.only_counts and not settings.weighs_replacements:
        remove_tree(work)  # nothing in it that another plan could use
    run.progress.say("plan: drop " + plan.describe())


def _settings(run: Run, budget: Budget) -> PlanSettings:
    """How the plan is looked for; what is chosen by scores is healed by a stage of its own."""
    settings = run.request.plan_settings.for_budget(budget)
    by_plan = settings.weighs_replacements or settings.limits_healed(budget)
    return replace(settings, heal=settings.heal if by_plan else None)


def heal_key(run: Run) -> Key:
    """How the plan is healed, and on which texts."""
    wanted, score = run.request.heal, run.request.score
    assert wanted is not None
    texts = wanted.calibration or score.calibration
    return {
        "load": vars(run.request.choosing),
        "options": asdict(wanted),
        "texts": text_hashes(run, texts, "calibration"),
        "other": file_hash(wanted.check_text),
        "samples": score.samples if run.is_encoder_decoder else None,
    }


def heal(run: Run, folder: Path) -> None:
    """Heals the plan; the healed one stands in a folder of its own, with its numbers."""
    wanted, chosen = run.request.heal, run.chosen_plan
    assert wanted is not None
    work = run.request.out / FOLDER / _FITS  # outlives an interrupted run
    texts = None
    if run.is_encoder_decoder:
        score = run.request.score
        samples = -(-(score.samples or PAIRS) * 5 // 4)  # healing holds a fifth out
        pairs = scored_pairs(
            run.choosing, score.calibration, samples=samples, progress=run.progress
        )
        texts = texts_of_pairs(pairs)
    healed = heal_plan(
        run.choosing,
        chosen.plan,
        wanted,
        made_from={"plan": chosen.sha256 or ""},
        allow_all=run.request.allow_empty,
        work=work,
        texts=texts,
        progress=run.progress,
    )
    (folder / HEALING).mkdir()
    healed.write(folder / HEALING)
    remove_tree(work)
    report = healed.report
    run.progress.say(f"heal: {healing_words(report.healing, report.reads)}")


def refuse_useless(run: Run) -> None:
    """Refuses a cut that ruins the model, where that was measured and no limit was asked for."""
    budget, plan = run.request.drops.budget, run.plan.plan
    if not run.request.refuses_useless or budget is None or budget.floors:
        return
    if not (lost := _ruin(plan, run)):
        return
    raise UnmetGoalError(
        f"Without {plan.describe()} the model is useless: {lost}, on text of "
        f"{', '.join(text.source for text in plan.judged_on[:1]) or 'the search'}.",
        "Ask for less; without a number or a goal the largest cut is found that costs next to "
        "nothing, or --allow-damage goes on.",
        code="useless",
    )


_ERRORS = 2.5  # of a share on a few texts, which may stand for a useful one


def _ruin(plan: PruningPlan, run: Run) -> str:
    """What a cut costs, in words, where nobody would ship the model; else empty."""
    figure = kind_of(plan.predicted).limited[0]
    value = plan.predicted.get(figure.key)
    if value is None or figure.loss(value) <= figure.loss(figure.useless):
        return ""
    several = ""
    if figure.is_share:
        several = nouns_of(type(run.choosing.model).__name__).several
        texts: float = plan.judged_on[0].samples if plan.judged_on else 0
        if together_in(run.choosing.model) > 1:
            texts /= 2  # as many orders are seen
        if not texts or value + _ERRORS * math.sqrt(value * (1 - value) / texts) >= figure.useless:
            return ""
    return figure.useless_words.format(
        value=value,
        factor=1 + figure.held(value),
        limit=figure.useless,
        several=several,
    )
