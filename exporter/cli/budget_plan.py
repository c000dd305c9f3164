"""The part of `depthcut plan` that holds budgets: from click's options to the planner and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.budget_options import TIMING, asks_for_budget, budget_request, usual_heal
from exporter.cli.console import ConsoleProgress
from exporter.cli.options import AUTO
from exporter.cli.search_options import search_request
from graph_passes.files.locations import real

if TYPE_CHECKING:
    from exporter.artifacts import ImportanceReport, PruningPlan
    from exporter.choose.budgets import Budget, Planner, PlanSettings, Workplace
    from exporter.choose.costs import CostTable
    from exporter.choose.selection import SearchOptions

_SECONDS = 60.0
"""For the rounds of a sublayer's cost, where nothing is said."""


def wants_planner(options: Mapping[str, Any]) -> bool:
    """Whether more is asked for than a choice by scores or damage."""
    healed = options["heal"] not in (None, "none")
    return healed or asks_for_budget(options) or options["curve"] is not None


def searched(options: Mapping[str, Any]) -> SearchOptions:
    """How to search: by damage, since nothing else tells when a budget is held.

    Raises:
        UsageError: Another way was asked for.
    """
    from exporter.errors import UsageError

    search = search_request(options)
    if search.by_damage:
        return search
    context = click.get_current_context()
    given = context.get_parameter_source("search")
    if given is not click.core.ParameterSource.DEFAULT:
        raise UsageError(
            f"Budgets are held by measured damage; --search {search.search} measures none.",
            "Leave --search away, or take greedy or evolution.",
        )
    return replace(search, search="greedy")


def refuse_places(
    report: ImportanceReport, output: Path, importance: Path, options: Mapping[str, Any]
) -> None:
    """Refuses what would be written over an input, or beside a model's weights.

    Raises:
        UsageError: With what would happen.
    """
    from exporter.errors import UsageError
    from exporter.files import refuse_overwriting
    from exporter.heal.plan_file import files_of
    from exporter.heal.plan_file import refuse_places as refuse_plan_places

    names = (options["onnx"], options["calibration"], options["costs"])
    inputs = [importance, *map(Path, filter(None, names))]
    model = Path(options["model"] or report.model.source)
    refuse_plan_places(output, inputs, model)
    curve: Path | None = options["curve"]
    if curve is not None and curve == curve.with_suffix(".html"):
        raise UsageError(
            f"{curve} is to hold the curve's numbers; the page stands beside them as .html.",
            "Write --curve front.json.",
        )
    for written in () if curve is None else (curve, curve.with_suffix(".html")):
        refuse_overwriting(written, [*inputs, model])
        if real(written) in {real(each) for each in files_of(output)}:
            raise UsageError(
                f"{written} is to hold the curve, and the plan's files too.",
                "Give --curve another name.",
            )


def plan_settings(options: Mapping[str, Any], budget: Budget) -> PlanSettings:
    """How the plan is looked for."""
    from exporter.choose.budgets import PlanSettings

    return PlanSettings(
        search=searched(options),
        heal=options["heal"] or usual_heal(budget),
        rank=options["rank"],
        calibration=options["calibration"],
        batch_size=options["batch_size"],
        check_text=options["check_text"],
    )


def planned(
    report: ImportanceReport,
    load: Callable[[], Any],
    output: Path,
    digest: str,
    options: Mapping[str, Any],
    progress: ConsoleProgress,
) -> PruningPlan | None:
    """Makes the plan and the curve that are asked for.

    Args:
        report: The scores.
        load: Loads the model.
        output: The plan's file.
        digest: Of the scores' file.
        options: click's.
        progress: Told what goes on.

    Returns:
        The plan as written; None where only the curve was asked for.
    """
    from exporter.choose.budgets import Workplace
    from exporter.errors import UsageError
    from exporter.heal.plan_file import write_healed_plan
    from graph_passes.files.placing import working

    if options["batch"] and options["fits"] is None:
        raise UsageError("--batch says how many sequences --fits is for.", "Give both, or neither.")
    if options["force"]:
        raise UsageError(
            "--force is for plans of so many sublayers; one that is planned by damage always "
            "leaves one.",
            "Leave it away, or plan numbers alone; depthcut heal --force puts replacements in.",
        )
    budget = budget_request(options, options["batch"] or 1)
    _refuse_idle_timing(options)
    _refuse_unmeasured(options)
    if options["curve"] is None:
        budget.refuse_empty()
    curve: Path | None = options["curve"]
    plan = None
    with working(output, forget=False) as kept:
        work = Workplace(kept)
        planner = _planner(report, load, digest, options, budget, work, progress)
        if budget.counts or not budget.only_counts:
            found = planner.plan()
            plan = write_healed_plan(
                output, found.plan, found.branch_replacements, report=found.healing
            )
            progress.say(f"plan: {found.words()}")
        if curve is not None:
            _write_curve(planner, curve, progress)
        if kept.exists():
            progress.say(f"plan: what was fitted and timed is kept for the next call: {kept}")
    return plan


def _planner(
    report: ImportanceReport,
    load: Callable[[], Any],
    digest: str,
    options: Mapping[str, Any],
    budget: Budget,
    work: Workplace,
    progress: ConsoleProgress,
) -> Planner:
    from exporter.choose.budgets import OnnxStopwatch, Planner
    from exporter.choose.costs import Effort, sizes

    onnx: Path | None = options["onnx"]
    seconds = options["time_budget"] or _SECONDS
    stopwatch = None
    if onnx is not None and budget.at is not None:
        stopwatch = OnnxStopwatch(
            onnx,
            budget.at,
            options["costs"] or work.costs,
            work.scratch,
            provider=options["provider"] or "cpu",
            threads=None if options["threads"] == AUTO else options["threads"],
            may_replace=options["costs"] is None,  # a file that was named is nobody's memory
            variants=Effort(seconds=seconds),
            candidates=Effort(seconds=2 * seconds),
            progress=progress,
        )
    return Planner(
        report,
        load,
        budget,
        plan_settings(options, budget),
        work=work,
        sizes=None if onnx is None else sizes(onnx),
        stopwatch=stopwatch,
        costs=None if stopwatch is not None else _measured_before(options["costs"]),
        importance_sha256=digest,
        progress=progress,
    )


def _refuse_idle_timing(options: Mapping[str, Any]) -> None:
    from exporter.errors import UsageError

    if options["onnx"] is not None and options["at"] is not None:
        return
    for name in TIMING:
        if options[name] is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is for times that are measured on the exported graph.",
                "Name it with --onnx and the request with --at, or leave this away.",
            )


def _refuse_unmeasured(options: Mapping[str, Any]) -> None:
    from exporter.errors import UsageError

    if options["require_speedup"] and options["onnx"] is None:
        raise UsageError(
            "--require-speedup wants a speedup that is measured, and without the exported graph "
            "none is.",
            "Name it with --onnx, or leave this away.",
        )


def _measured_before(path: Path | None) -> CostTable | None:
    from exporter.choose.costs import CostTable

    return None if path is None else CostTable.read(path)


def _write_curve(planner: Planner, path: Path, progress: ConsoleProgress) -> None:
    """The data, and the page beside it."""
    from exporter.printable import counted
    from exporter.report.files import write_front

    curve = planner.curve()
    page = write_front(curve, path)
    progress.say(f"plan: a front of {counted(len(curve.front), 'plan')}: {path} and {page}")
