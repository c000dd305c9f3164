"""The part of `depthcut plan` that makes plans: from click's options to the planner and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.cli.budget_options import (
    IDLE,
    TIMING,
    asked_heal,
    asks_for_budget,
    budget_request,
    refuse_idle,
)
from exporter.cli.cluster_options import refuse_with_budget, spread_meters
from exporter.cli.console import ConsoleProgress
from exporter.cli.options import AUTO
from exporter.cli.search_options import search_request
from graph_passes.files.locations import real

if TYPE_CHECKING:
    from exporter.artifacts import ImportanceReport, PruningPlan
    from exporter.choose.budgets import Budget, Planner, PlanSettings, Workplace
    from exporter.choose.costs import CostTable
    from exporter.choose.selection import MakeMeter

_SECONDS = 60.0
"""For the rounds of a sublayer's cost, where nothing is said."""


def refuse_places(
    report: ImportanceReport, output: Path, importance: Path, options: Mapping[str, Any]
) -> None:
    """Refuses what would be written over an input, or beside a model's weights.

    Raises:
        UsageError: With what would happen.
    """
    if asked_heal(options) is None and not asks_for_budget(options) and options["curve"] is None:
        return  # a bare plan is one file
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


def plan_settings(options: Mapping[str, Any]) -> PlanSettings:
    """How the plan is looked for.

    Raises:
        UsageError: Something is said of replacements that nobody asked for.
    """
    from exporter.choose.budgets import PlanSettings
    from exporter.errors import UsageError
    from exporter.heal.options import HealOptions

    kind, given = asked_heal(options), {n: options[n] for n in ("rank", "check_text")}
    for name, value in given.items():
        if kind is None and value is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is for replacements, and there are none.",
                "Leave it away, or take --heal linear or best.",
            )
    size = options["batch_size"]
    return PlanSettings(
        search=search_request(options),
        heal=None if kind is None else HealOptions(kind=kind, batch_size=size, **given),
        calibration=options["calibration"],
        batch_size=size,
        allow_all=options["force"],
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
    from exporter.heal.plan_file import write_healed_plan
    from graph_passes.files.placing import working

    budget, settings = budget_request(options), plan_settings(options)
    curve: Path | None = options["curve"]
    wanted = bool(budget.counts or not budget.only_counts)
    if curve is None:
        budget.refuse_empty()
    settled = settings.settled(budget)
    _refuse_idle(options, budget, settled)
    keeps = curve is not None or not budget.only_counts or settled.weighs_replacements
    plan = None
    with working(output, forget=not keeps) as kept, ExitStack() as workers:
        work = Workplace(kept)
        meters = spread_meters(options, workers, progress)
        planner = _planner(report, load, digest, options, budget, settings, work, meters, progress)
        if wanted:
            found = planner.plan()
            told = {} if options["metric"] is None else {"metric": report.metric}
            noted = found.plan.model_copy(update={"budget": {**found.plan.budget, **told}})
            # Takes along what an earlier plan had beside it.
            plan = write_healed_plan(output, noted, found.branch_replacements, report=found.healing)
            if words := found.words():
                progress.say(f"plan: {words}")
        if curve is not None:
            _write_curve(planner, curve, progress)
        if keeps and kept.exists():
            progress.say(f"plan: what was fitted and timed is kept for the next call: {kept}")
    return plan


def _refuse_idle(options: Mapping[str, Any], budget: Budget, settings: PlanSettings) -> None:
    """Refuses what this plan has no use for.

    Raises:
        UsageError: It was given.
    """
    from exporter.errors import UsageError

    if options["force"] and not budget.only_counts:
        raise UsageError(
            "--force is for plans of so many sublayers; one for another budget always leaves one.",
            "Leave it away, or plan numbers alone; depthcut heal --force puts replacements in.",
        )
    if budget.only_counts and not settings.search.by_damage and options["curve"] is None:
        refuse_idle(options, (*IDLE, "onnx", "costs", *TIMING))
    if not budget.only_counts or settings.weighs_replacements or options["curve"] is not None:
        refuse_with_budget(options)
    _refuse_idle_timing(options)
    _refuse_unmeasured(options)


def _planner(
    report: ImportanceReport,
    load: Callable[[], Any],
    digest: str,
    options: Mapping[str, Any],
    budget: Budget,
    settings: PlanSettings,
    work: Workplace,
    make_meter: MakeMeter | None,
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
        settings,
        work=work,
        make_meter=make_meter,
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
