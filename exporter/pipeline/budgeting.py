"""The plan stage of `depthcut export` where a budget is asked for, not a number of sublayers."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from exporter.artifacts.ledger import FOLDER
from exporter.choose.budgets import Budget, OnnxStopwatch, Planner, PlanSettings, Workplace
from exporter.choose.costs import Effort
from exporter.errors import UsageError
from exporter.files import sha256_file
from exporter.pipeline.request import BudgetRequest
from exporter.pipeline.run import Run

_PLACE = "planning"


def plan_within(run: Run, wanted: BudgetRequest) -> list[Path]:
    """Plans what holds a budget, on the exported baseline.

    Costs and fits are kept in the output folder's memory, where an interrupted run finds them.

    Returns:
        The plan, and the numbers of its replacements if it has any.

    Raises:
        PlanError: There is no such plan; says what is reachable.
    """
    from exporter.choose.costs import sizes
    from exporter.heal.plan_file import numbers_of, report_of, write_healed_plan

    budget = wanted.budget
    work = Workplace(run.request.out / FOLDER / _PLACE)
    graph = run.ledger.path("baseline") / "model.onnx"
    if budget.at is not None:
        run.free_model()  # costs are measured first, and want the machine for themselves
    planner = Planner(
        run.importance(),
        lambda: run.choosing,
        budget,
        settings_of(run, wanted),
        work=work,
        sizes=sizes(graph),
        stopwatch=None if budget.at is None else _stopwatch(run, budget, graph, work),
        importance_sha256=sha256_file(run.ledger.path("importance.json")),
        progress=run.progress,
    )
    found = planner.plan()
    path = run.ledger.work / "plan.json"
    plan = write_healed_plan(path, found.plan, found.branch_replacements, report=found.healing)
    run.progress.say(f"plan: {found.words()}")
    report = report_of(plan, path)
    return [path, *numbers_of(plan, path), *([] if report is None else [report])]


def settings_of(run: Run, wanted: BudgetRequest) -> PlanSettings:
    """How the plan is looked for."""
    request = run.request
    search = request.search
    if search.search == "one-shot":
        search = replace(search, search="greedy")
    return PlanSettings(
        search=search,
        heal=wanted.heal,
        rank=wanted.rank,
        check_text=wanted.check_text,
        calibration=request.score.calibration,
        batch_size=request.score.batch_size,
    )


def budget_key(run: Run, wanted: BudgetRequest) -> dict[str, Any]:
    """What such a plan depends on, beside the scores and the search."""
    from exporter.engines.environment import default_threads, gpu_name, processor_name

    timed = wanted.budget.at is not None
    return {
        "budget": asdict(wanted.budget),
        "settings": asdict(settings_of(run, wanted)),
        "baseline": run.ledger.files_hash("export"),
        "provider": run.request.compare.provider if timed else None,
        "threads": run.request.compare.threads if timed else None,
        "machine": [processor_name(), default_threads(), gpu_name()] if timed else None,
    }


def _stopwatch(run: Run, budget: Budget, graph: Path, work: Workplace) -> OnnxStopwatch:
    if budget.at is None:
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
