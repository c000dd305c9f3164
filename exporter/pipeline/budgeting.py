"""The plan stage of `depthcut export` where what to drop is chosen, and not given."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from exporter.artifacts.ledger import FOLDER
from exporter.choose.budgets import Budget, OnnxStopwatch, Planner, PlanSettings, Workplace
from exporter.choose.costs import Effort
from exporter.errors import UsageError
from exporter.files import sha256_file
from exporter.pipeline.run import Run
from graph_passes.files.placing import remove_tree

_PLACE = "planning"


def choose_plan(run: Run, budget: Budget) -> list[Path]:
    """Plans what holds a budget, on the exported baseline where its sizes or times matter.

    Costs and fits are kept in the output folder's memory, where an interrupted run finds them.

    Returns:
        The plan, and the numbers of its replacements if it has any.

    Raises:
        PlanError: There is no such plan; says what is reachable.
    """
    from exporter.choose.costs import sizes
    from exporter.heal.plan_file import numbers_of, report_of, write_healed_plan

    work = Workplace(run.request.out / FOLDER / _PLACE)
    graph = None
    if run.request.plans_on_graph:
        graph = run.ledger.path("baseline") / "model.onnx"
    if budget.at is not None:
        run.free_model()  # costs are measured first, and want the machine for themselves
    settings = settings_of(run, budget)
    planner = Planner(
        run.importance(),
        lambda: run.choosing,
        budget,
        settings,
        work=work,
        sizes=None if graph is None else sizes(graph),
        stopwatch=None if budget.at is None else _stopwatch(run, budget, graph, work),
        importance_sha256=sha256_file(run.ledger.path("importance.json")),
        progress=run.progress,
    )
    found = planner.plan()
    path = run.ledger.work / "plan.json"
    plan = write_healed_plan(path, found.plan, found.branch_replacements, report=found.healing)
    if budget.only_counts and not settings.weighs_replacements:
        remove_tree(work.folder)  # nothing in it that another plan could use
    run.progress.say("plan: drop " + plan.describe())
    if words := found.words():
        run.progress.say(f"plan: {words}")
    report = report_of(plan, path)
    return [path, *numbers_of(plan, path), *([] if report is None else [report])]


def settings_of(run: Run, budget: Budget) -> PlanSettings:
    """How the plan is looked for; what is chosen by scores is healed by a stage of its own."""
    settings = run.request.plan_settings.settled(budget)
    return replace(settings, heal=settings.heal if settings.weighs_replacements else None)


def budget_key(run: Run, budget: Budget) -> dict[str, Any]:
    """What such a plan depends on, beside the scores."""
    from exporter.engines.environment import default_threads, gpu_name, processor_name

    timed = budget.at is not None
    return {
        "budget": asdict(budget),
        "settings": asdict(settings_of(run, budget)),
        "baseline": run.ledger.files_hash("export") if run.request.plans_on_graph else None,
        "provider": run.request.compare.provider if timed else None,
        "threads": run.request.compare.threads if timed else None,
        "machine": [processor_name(), default_threads(), gpu_name()] if timed else None,
    }


def _stopwatch(run: Run, budget: Budget, graph: Path | None, work: Workplace) -> OnnxStopwatch:
    if budget.at is None or graph is None:
        raise UsageError("No request is named.", "Name it with --at.")
    compare = run.request.compare
    seconds = compare.timing.time_budget_s
    return OnnxStopwatch(
        graph,
        budget.at,
        work.costs,
        work.scratch,
        provider=compare.provider,
        threads=compare.threads,
        variants=Effort(seconds=seconds, rounds=compare.rounds),
        candidates=Effort(seconds=2 * seconds, rounds=compare.rounds),
        progress=run.progress,
    )
