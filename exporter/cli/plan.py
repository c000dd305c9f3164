"""`depthcut plan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.budget_options import (
    IDLE,
    TIMING,
    budget_options,
    budgeting,
    refuse_idle,
    replacement_options,
)
from exporter.cli.cluster_options import ray_options, refuse_with_budget, spread_meters
from exporter.cli.console import ConsoleProgress
from exporter.cli.metric_options import METRIC_NAMES
from exporter.cli.options import (
    ANY_PATH,
    EXISTING_FILE,
    ONNX_FILE,
    Threads,
    drop_options,
    force_option,
    json_option,
    loading,
    model_options,
    scoring,
    speed,
    verbosity_options,
)
from exporter.cli.required_speedup import end_by_speedup
from exporter.cli.search_options import search_options
from exporter.cli.sections import Count, SectionedCommand
from exporter.cli.timing_options import Duration

if TYPE_CHECKING:
    from exporter.artifacts import ImportanceReport, PruningPlan


@click.command(
    cls=SectionedCommand, short_help="Choose what to drop: by scores, by a search, for a budget."
)
@click.argument("importance", type=EXISTING_FILE)
@click.option("-o", "--output", type=ANY_PATH, default=Path("plan.json"), show_default=True)
@drop_options
@force_option
@budget_options
@replacement_options
@budgeting(
    "--batch", type=Count(),
    help="Of --fits: sequences whose caches are held. [1]",
)  # fmt: skip
@budgeting(
    "--curve", type=ANY_PATH, metavar="FILE.json",
    help="Write the whole front of what plans gain and cost, and a page with the plot beside it.",
)  # fmt: skip
@speed(
    "--onnx", type=ONNX_FILE, metavar="GRAPH",
    help="The exported graph: requests are timed on it, and sizes read from it.",
)  # fmt: skip
@speed(
    "--costs", type=ANY_PATH, metavar="FILE",
    help="Measured costs of sublayers: kept here, and used again for the same graph, request and "
    "machine. Without --onnx they foretell, and nothing is measured.",
)  # fmt: skip
@speed(
    "--provider", type=click.Choice(["cpu", "cuda"]),
    help="Where ONNX Runtime runs the graph. [cpu]",
)  # fmt: skip
@speed(
    "--threads", type=Threads(),
    help="CPU threads; auto: what makes the graph's step fastest. [auto]",
)  # fmt: skip
@speed(
    "--time-budget", type=Duration(),
    help="What the rounds of a sublayer's cost may take; those of a candidate twice as much. [60s]",
)  # fmt: skip
@search_options
@scoring(
    "--metric", type=click.Choice(METRIC_NAMES), metavar="NAME",
    help="Which of IMPORTANCE's metrics decides. [its first]",
)  # fmt: skip
@scoring(
    "--calibration", metavar="SOURCE",
    help="Text to search on, as in depthcut score. [the one that IMPORTANCE rests on]",
)  # fmt: skip
@scoring(
    "--batch-size", type=Count(), default=4, show_default=True,
    help="Samples in one forward pass.",
)  # fmt: skip
@loading("--model", metavar="MODEL", help="The model, for searches that run it. [as IMPORTANCE]")
@model_options
@ray_options
@json_option
@verbosity_options
@click.pass_obj
def plan(
    progress: ConsoleProgress, /, importance: Path, output: Path, *, as_json: bool, **options: Any
) -> None:
    """Choose what to drop from an importance.json: by its scores, by a search, or for a budget.

    Numbers alone take the lowest scores, or what --search finds. Any other budget is held by
    measured damage, with replacements where they help; budgets combine. What an interrupted call
    has found out is used when the same command is run again.
    """
    from exporter.artifacts import ImportanceReport
    from exporter.cli import budget_plan
    from exporter.cli.requests import source_options
    from exporter.cli.results import print_artifact
    from exporter.files import refuse_overwriting, sha256_file

    given = (options["onnx"], options["model"], options["calibration"])
    for written in (output, options["curve"], options["costs"]):
        if written is not None:
            refuse_overwriting(written, [importance, *map(Path, filter(None, given))])
    report = ImportanceReport.read(importance).of_metric(options["metric"])
    if budget_plan.wants_planner(options):
        budget_plan.refuse_places(report, output, importance, options)
    digest = sha256_file(importance)

    def load() -> Any:
        from exporter.models.loading.model_source import load_model

        if options["model"] is None:
            return _scored_model(importance, report.model.source, options, progress)
        with progress.task(f"load {options['model']}"):
            return load_model(options["model"], **vars(source_options(options)))

    if budget_plan.wants_planner(options):
        refuse_with_budget(options)
        result = budget_plan.planned(report, load, output, digest, options, progress)
    else:
        refuse_idle(options, (*IDLE, *TIMING))
        result = _counted(report, load, output, digest, options, progress)
    if result is not None:
        print_artifact(result, output, as_json, "Drop " + result.describe())
        if options["require_speedup"]:
            end_by_speedup(result)


def _scored_model(
    importance: Path, source: str, options: Mapping[str, Any], progress: ConsoleProgress
) -> Any:
    """Loads the model that the scores name; only the user can ask the network for one."""
    from exporter.cli.requests import source_options
    from exporter.errors import ModelSourceError
    from exporter.models.loading.model_source import load_model
    from exporter.models.loading.offline import hub_off

    try:
        with progress.task(f"load {source}"), hub_off():
            return load_model(source, **vars(source_options(options)))
    except ModelSourceError as error:
        if Path(source).exists():
            raise
        raise ModelSourceError(
            f"The model {source}, which {importance} names, is not on this machine.",
            "Name it with --model if it shall be fetched.",
        ) from error


def _counted(
    report: ImportanceReport,
    load: Callable[[], Any],
    output: Path,
    digest: str,
    options: Mapping[str, Any],
    progress: ConsoleProgress,
) -> PruningPlan:
    """A plan for numbers, by scores or a search."""
    from exporter.choose.selection import choose
    from exporter.cli.requests import drop_request
    from exporter.cli.search_options import search_request
    from exporter.heal.plan_file import write_healed_plan
    from exporter.pipeline.request import COUNTS
    from graph_passes.files.placing import working

    counts = {name: options[name] or 0 for name in COUNTS}
    if not any(counts.values()):
        drop_request(options)  # says what may be asked for
    search = search_request(options)
    with working(output) as kept, ExitStack() as workers:
        result = choose(
            report,
            counts,
            search,
            load=load,
            calibration=options["calibration"],
            batch_size=options["batch_size"],
            journal=kept / "search.journal",
            make_meter=spread_meters(options, workers, progress),
            importance_sha256=digest,
            allow_all=options["force"],
            progress=progress,
        )
        if options["metric"]:
            told = {**result.budget, "metric": report.metric}
            result = result.model_copy(update={"budget": told})
        # Takes along what an earlier plan had beside it.
        return write_healed_plan(output, result, {})
