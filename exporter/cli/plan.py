"""`depthcut plan`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import ImportanceReport, PruningPlan
from exporter.choose.budgets.budget import REACHING, Budget
from exporter.choose.budgets.settings import PlanSettings, settled_heal
from exporter.choose.costs.table import CostTable
from exporter.choose.selection.meters import MakeMeter
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress
from exporter.cli.required_speedup import RequiredSpeedup, exit_code
from exporter.cli.results import print_artifact
from exporter.compare.options import SPEED, RunOptions
from exporter.errors import ModelSourceError, UsageError
from exporter.files import refuse_overwriting, sha256_file
from exporter.models.loading.model_source import load_model
from exporter.models.loading.options import LOADING, SourceOptions
from exporter.models.loading.transformers_calls import hub_off
from exporter.option_types import Duration, InputFile, OnnxFile, OutputPath
from exporter.options import (
    Options,
    Rule,
    argument,
    dataclass,
    excludes,
    is_given,
    only_with,
    option,
    part,
)
from exporter.printable import counted
from exporter.score.cluster.loading import ModelAddress
from exporter.score.cluster.meter import cluster_meter
from exporter.score.cluster.options import ClusterOptions
from exporter.score.cluster.pool import open_pool
from exporter.score.options import SCORING, MetricName
from graph_passes.files.locations import real
from graph_passes.files.placing import working

if TYPE_CHECKING:
    from exporter.choose.budgets.inputs import Workplace
    from exporter.choose.budgets.planner import Planner


def _timed(name: str) -> Rule:
    return Rule(
        (name, "onnx", "budget.at"),
        lambda told: is_given(told, name) and not (told.onnx and told.budget.at),
        "{0} is for times that are measured on the exported graph.",
        "Name it with {1} and the request with {2}, or leave this away.",
    )


def _idle(name: str) -> Rule:
    return Rule(
        (name,),
        lambda told: is_given(told, name) and told.goes_by_scores,
        "{0} is for searches by damage, and for budgets that are more than numbers.",
        "Say what to reach, such as --target-speedup 1.25 or --parameters 10%.",
    )


@dataclass(frozen=True, kw_only=True)
class PlanCall(Options):
    """What `depthcut plan` is asked to do."""

    importance: InputFile = argument("IMPORTANCE")
    output: OutputPath = option(Path("plan.json"), "The plan.", "-o", "--output")
    budget: Budget = part(Budget())
    required: RequiredSpeedup = part(RequiredSpeedup())
    settings: PlanSettings = part(
        PlanSettings(), config_only=("seconds",), rare=("batch_size", "protect", "check_text")
    )
    curve: OutputPath | None = option(
        None,
        "Write the whole front of what plans gain and cost, and a page with the plot beside it.",
        metavar="FILE.json",
        section=REACHING,
    )
    onnx: OnnxFile | None = option(
        None,
        "The exported graph: requests are timed on it, and sizes read from it.",
        metavar="GRAPH",
        section=SPEED,
    )
    costs: OutputPath | None = option(
        None,
        "Measured costs of sublayers: kept here, and used again for the same graph, request and "
        "machine. Without --onnx they foretell, and nothing is measured.",
        metavar="FILE",
        section=SPEED,
    )
    run: RunOptions = part(RunOptions(), rare=("provider", "threads"))
    time_budget_s: Duration = option(
        60.0,
        "Seconds that the rounds of a sublayer's cost may take; those of a candidate twice as "
        "much.",
        "--time-budget",
        section=SPEED,
        rare=True,
    )
    metric: MetricName | None = option(
        None,
        "Which of IMPORTANCE's metrics decides.",
        metavar="NAME",
        usual="its first",
        section=SCORING,
    )
    model: str | None = option(
        None,
        "The model, for searches that run it.",
        metavar="MODEL",
        usual="as IMPORTANCE",
        section=LOADING,
    )
    load: SourceOptions = part(SourceOptions(), without=("dtype",))
    cluster: ClusterOptions | None = part(switch="address")

    rules = (
        only_with("required.require_speedup", "budget.target_speedup"),
        only_with("required.require_speedup", "onnx", hint="Without {1} no speedup is measured."),
        *map(_timed, ("run.provider", "run.threads", "time_budget_s")),
        *map(_idle, ("budget.at", "budget.kinds", "onnx", "costs")),
        Rule(
            ("settings.allow_all",),
            lambda told: told.settings.allow_all and not told.budget.only_counts,
            "{0} is for plans of so many sublayers; one for another budget always leaves one.",
            "Leave it away, or plan numbers alone; depthcut heal {0} puts replacements in.",
        ),
        excludes("cluster", "curve", "a front is made in one process"),
        Rule(
            ("cluster",),
            lambda told: told.cluster is not None and not told.spreads,
            "{0} spreads searches for numbers by damage; other plans are made in one process.",
            "Take --search greedy or evolution and no --heal, or leave {0} away.",
        ),
    )

    @classmethod
    def settle(cls, told: Mapping[str, Any]) -> Mapping[str, Any]:
        """Budgets that are more than numbers put in what helps, where nothing is said."""
        return settled_heal(told)

    @property
    def wants_plan(self) -> bool:
        """Whether a plan is asked for, and not the front alone."""
        return bool(self.budget.counts or not self.budget.only_counts)

    @property
    def goes_by_scores(self) -> bool:
        """Whether nothing is measured."""
        by_damage = self.settings.search.by_damage
        return self.budget.only_counts and not by_damage and self.curve is None

    @property
    def spreads(self) -> bool:
        """Whether the search can be spread over a cluster."""
        damage = self.settings.search.by_damage and self.settings.heal is None
        return self.budget.only_counts and damage


@command(PlanCall)
def plan(call: PlanCall, progress: ConsoleProgress) -> int:
    """Choose what to drop from an importance.json: by its scores, by a search, or for a budget.

    Numbers alone take the lowest scores, or what --search finds; --heal fits what takes the places
    of what was chosen, or is weighed by the search. Any other budget is held by measured damage,
    with replacements where they help; budgets combine. What an interrupted call has found out is
    used when the same command is run again.
    """
    report = ImportanceReport.read(call.importance).of_metric(call.metric)
    _refuse_places(call, report)
    made = _planned(call, report, progress)
    if made is None:
        return 0
    print_artifact(made, call.output, progress.as_json, "Drop " + made.describe())
    return exit_code(made) if call.required.require_speedup else 0


def _refuse_places(call: PlanCall, report: ImportanceReport) -> None:
    """Refuses what would be written over an input, or beside a model's weights.

    Raises:
        UsageError: With what would happen.
    """
    from exporter.heal.plan_file import refuse_places

    text, model = call.settings.calibration, call.model
    inputs = [call.importance, *map(Path, filter(None, (text, model)))]
    inputs += [call.onnx] if call.onnx is not None else []
    for written in filter(None, (call.output, call.curve, call.costs)):
        refuse_overwriting(written, inputs)
    if call.settings.heal is None and call.budget.only_counts and call.curve is None:
        return  # a bare plan is one file
    inputs += [call.costs] if call.costs is not None else []
    folder = Path(model or report.model.source)
    read = [path for path in inputs if model is None or path != Path(model)]
    refuse_places(call.output, read, folder)
    if call.curve is not None:
        _refuse_curve(call.curve, call.output, [*read, folder])


def _refuse_curve(curve: Path, output: Path, inputs: list[Path]) -> None:
    from exporter.heal.plan_file import files_of

    page = curve.with_suffix(".html")
    if curve == page:
        raise UsageError(
            f"{curve} is to hold the curve's numbers; the page stands beside them as .html.",
            "Write --curve front.json.",
        )
    for written in (curve, page):
        refuse_overwriting(written, inputs)
        if real(written) in {real(each) for each in files_of(output)}:
            raise UsageError(
                f"{written} is to hold the curve, and the plan's files too.",
                "Give --curve another name.",
            )


def _planned(
    call: PlanCall, report: ImportanceReport, progress: ConsoleProgress
) -> PruningPlan | None:
    """Makes the plan and the curve that are asked for; None where only the curve is."""
    from exporter.choose.budgets.inputs import Workplace
    from exporter.report.files import write_front

    if call.curve is None:
        call.budget.refuse_empty()
    weighs = call.settings.for_budget(call.budget).weighs_replacements
    keeps = call.curve is not None or not call.budget.only_counts or weighs
    made = None
    with working(call.output, forget=not keeps) as kept, ExitStack() as workers:
        planner = _planner(call, report, Workplace(kept), workers, progress)
        if call.wants_plan:
            made = _write_plan(call, report, planner, progress)
        if call.curve is not None:
            curve = planner.curve()
            page = write_front(curve, call.curve)
            found = counted(len(curve.front), "plan")
            progress.say(f"plan: a front of {found}: {call.curve} and {page}")
        if keeps and kept.exists():
            progress.say(f"plan: what was fitted and timed is kept for the next call: {kept}")
    return made


def _write_plan(
    call: PlanCall, report: ImportanceReport, planner: Planner, progress: ConsoleProgress
) -> PruningPlan:
    from exporter.heal.plan_file import write_healed_plan

    found = planner.plan()
    told = {} if call.metric is None else {"metric": report.metric}
    noted = found.plan.model_copy(update={"budget": {**found.plan.budget, **told}})
    # Takes along what an earlier plan had beside it.
    made = write_healed_plan(call.output, noted, found.branch_replacements, report=found.healing)
    if words := found.words():
        progress.say(f"plan: {words}")
    return made


def _planner(
    call: PlanCall,
    report: ImportanceReport,
    work: Workplace,
    workers: ExitStack,
    progress: ConsoleProgress,
) -> Planner:
    from exporter.choose.budgets.planner import Planner
    from exporter.choose.budgets.target_speedup import OnnxStopwatch
    from exporter.choose.costs.timing import Effort
    from exporter.choose.costs.weighing import sizes

    stopwatch = None
    if call.onnx is not None and call.budget.at is not None:
        stopwatch = OnnxStopwatch(
            call.onnx,
            call.budget.at,
            call.costs or work.costs,
            work.scratch,
            provider=call.run.provider,
            threads=call.run.threads,
            may_replace=call.costs is None,  # a file that was named is nobody's memory
            variants=Effort(seconds=call.time_budget_s),
            candidates=Effort(seconds=2 * call.time_budget_s),
            progress=progress,
        )
    known = call.costs if stopwatch is None else None
    return Planner(
        report,
        lambda: _model(call, report.model.source, progress),
        call.budget,
        call.settings,
        work=work,
        make_meter=_spread_meters(call, workers, progress),
        sizes=None if call.onnx is None else sizes(call.onnx),
        stopwatch=stopwatch,
        costs=None if known is None else CostTable.read(known),
        importance_sha256=sha256_file(call.importance),
        progress=progress,
    )


def _model(call: PlanCall, source: str, progress: ConsoleProgress) -> Any:
    """Loads the model; only the user can ask the network for the one that the scores name."""
    if call.model is not None:
        with progress.task(f"load {call.model}"):
            return load_model(call.model, **vars(call.load))
    try:
        with progress.task(f"load {source}"), hub_off():
            return load_model(source, **vars(call.load))
    except ModelSourceError as error:
        if Path(source).exists():
            raise
        raise ModelSourceError(
            f"The model {source}, which {call.importance} names, is not on this machine.",
            "Name it with --model if it shall be fetched.",
        ) from error


def _spread_meters(
    call: PlanCall, workers: ExitStack, progress: ConsoleProgress
) -> MakeMeter | None:
    """What measures a search's candidates on a cluster; None where no cluster is asked for."""
    cluster = call.cluster
    if cluster is None:
        return None

    def make(loaded: Any, text: Any, batch_size: int, positions: int) -> Any:
        pool = workers.enter_context(
            open_pool(cluster.address, workers=cluster.workers, progress=progress)
        )
        meter = cluster_meter(
            pool,
            ModelAddress.of(loaded, vars(call.load)),
            text,
            num_layers=loaded.ref.num_layers,
            batch_size=batch_size,
            positions=positions,
        )
        return workers.enter_context(meter)

    return make
