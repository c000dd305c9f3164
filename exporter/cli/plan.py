"""`depthcut plan`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from exporter.cli.budget_options import budget_options, budgeting, replacement_options
from exporter.cli.cluster_options import ray_options
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

    Numbers alone take the lowest scores, or what --search finds; --heal fits what takes the places
    of what was chosen, or is weighed by the search. Any other budget is held by measured damage,
    with replacements where they help; budgets combine. What an interrupted call has found out is
    used when the same command is run again.
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
    budget_plan.refuse_places(report, output, importance, options)

    def load() -> Any:
        from exporter.models.loading.model_source import load_model

        if options["model"] is None:
            return _scored_model(importance, report.model.source, options, progress)
        with progress.task(f"load {options['model']}"):
            return load_model(options["model"], **vars(source_options(options)))

    digest = sha256_file(importance)
    result = budget_plan.planned(report, load, output, digest, options, progress)
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
    from exporter.models.loading.transformers_calls import hub_off

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
