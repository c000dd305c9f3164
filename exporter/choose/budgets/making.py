"""From a request to a plan's file: where it may be written, and with what its planner works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.artifacts import ImportanceReport, PruningPlan
from exporter.choose.budgets.inputs import COSTS
from exporter.choose.budgets.planner import Planner
from exporter.choose.budgets.settings import PlanRequest
from exporter.choose.budgets.target_speedup import Stopwatch
from exporter.choose.budgets.units import with_request
from exporter.choose.costs.table import CostTable
from exporter.choose.costs.timing import Effort
from exporter.choose.costs.weighing import sizes
from exporter.errors import ModelSourceError
from exporter.files import refuse_overwriting, sha256_file
from exporter.heal.plan_file import refuse_places, write_healed_plan
from exporter.models.loading.model_class import hub_off
from exporter.models.loading.model_source import load_model
from exporter.progress import Progress
from graph_passes.files.placing import SCRATCH, working


def make_plan(request: PlanRequest, progress: Progress) -> PruningPlan:
    """Makes the plan that is asked for, and writes it."""
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
        if Path(source).exists():
            raise
        raise ModelSourceError(
            f"The model {source}, which {request.importance} names, is not on this machine.",
            "Give it with --model to fetch it.",
        ) from error
