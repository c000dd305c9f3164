"""`depthcut plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli.console import ConsoleProgress
from exporter.cli.metric_options import METRIC_NAMES
from exporter.cli.options import (
    ANY_PATH,
    EXISTING_FILE,
    drop_options,
    json_option,
    loading,
    model_options,
    scoring,
    verbosity_options,
)
from exporter.cli.search_options import search_options
from exporter.cli.sections import Count, SectionedCommand


@click.command(cls=SectionedCommand, short_help="Choose what to drop, by scores or by a search.")
@click.argument("importance", type=EXISTING_FILE)
@click.option("-o", "--output", type=ANY_PATH, default=Path("plan.json"), show_default=True)
@drop_options
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
@json_option
@verbosity_options
@click.pass_obj
def plan(
    progress: ConsoleProgress, /, importance: Path, output: Path, *, as_json: bool, **options: Any
) -> None:
    """Choose what to drop from an importance.json: the lowest scores first, or by a search.

    A search that is interrupted goes on where it was when the same command is run again.
    """
    from exporter.artifacts import ImportanceReport
    from exporter.cli.requests import drop_request, source_options
    from exporter.cli.results import print_artifact
    from exporter.cli.search_options import search_request
    from exporter.files import refuse_overwriting, sha256_file
    from exporter.selection import choose

    refuse_overwriting(output, [importance])
    report = ImportanceReport.read(importance).of_metric(options["metric"])

    def load() -> Any:
        from exporter.model_source import load_model

        source = options["model"] or report.model.source
        with progress.task(f"load {source}"):
            return load_model(source, **vars(source_options(options)))

    search = search_request(options)
    journal = output.with_name(f"{output.name}.journal")
    result = choose(
        report,
        {k: v for k, v in vars(drop_request(options)).items() if k != "plan"},
        search,
        load=load,
        calibration=options["calibration"],
        batch_size=options["batch_size"],
        journal=journal,
        importance_sha256=sha256_file(importance),
        progress=progress,
    )
    if options["metric"]:
        told = {**result.budget, "metric": report.metric}
        result = result.model_copy(update={"budget": told})
    result.write(output)
    if search.by_damage:
        journal.unlink(missing_ok=True)
    print_artifact(result, output, as_json, "Drop " + result.describe())
