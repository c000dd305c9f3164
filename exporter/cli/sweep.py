"""`depthcut sweep`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.cluster_options import asks_for_cluster, ray_options
from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.options import (
    ANY_PATH,
    EXISTING_FILE,
    danger_options,
    json_option,
    verbosity_options,
)
from exporter.cli.sections import SectionedCommand

if TYPE_CHECKING:
    from exporter.artifacts import SweepReport
    from exporter.pipeline.sweep import Runner


@click.command(
    cls=SectionedCommand, short_help="Export and compare many models, plans and precisions."
)
@click.argument("file", type=EXISTING_FILE, metavar="FILE.yaml")
@click.option("-o", "--output", type=ANY_PATH, required=True, help="Folder for all results.")
@click.option(
    "--dry-run", is_flag=True, help="Check the file and tell what there is to run; run nothing."
)
@click.option("--force", is_flag=True, help="Run every cell again, with all of its stages.")
@danger_options
@ray_options
@json_option
@verbosity_options
@click.pass_obj
@click.pass_context
def sweep(
    context: click.Context,
    progress: ConsoleProgress,
    /,
    file: Path,
    output: Path,
    *,
    dry_run: bool,
    force: bool,
    trust_remote_code: bool,
    allow_pickle: bool,
    allow_any_model_type: bool,
    as_json: bool,
    **cluster: Any,
) -> None:
    """Walk `depthcut export`'s road for every model with every plan in every precision of a file.

    What cells have in common is made once. Cells that are finished and whose settings are as they
    were are kept; the others are run, one after the other, each in a process of its own; with --ray
    each on a machine of its own. One that fails is told in the table, and the others go on; the
    exit code is then 1. The output folder holds sweep.json, sweep.md and sweep.html, and a folder
    for each cell.
    """
    from exporter.pipeline.sweep import Dangers, look, read_sweep, run_sweep

    asked = read_sweep(file)
    dangers = Dangers(trust_remote_code, allow_pickle, allow_any_model_type)
    if dry_run:
        report = look(asked, output, dangers=dangers, force=force)
        _print(report, as_json)
        _end(context, report)
        return
    report = run_sweep(
        asked, output, runner=_runner(cluster), dangers=dangers, force=force, progress=progress
    )
    _print(report, as_json)
    if not as_json:
        echo(f"Report: {output / 'sweep.html'}")
    _end(context, report)


def _runner(cluster: Mapping[str, Any]) -> Runner:
    """What runs the cells: this machine, or those of a cluster."""
    from exporter.pipeline.sweep.child import run_in_children
    from exporter.pipeline.sweep.on_ray import run_on_ray

    if not asks_for_cluster(cluster):
        return run_in_children
    return partial(run_on_ray, address=cluster["ray"], workers=cluster["ray_workers"])


def _print(report: SweepReport, as_json: bool) -> None:
    """The whole report as JSON; else a line a cell, then what failed."""
    from exporter.cli.results import print_rows
    from exporter.report.sections.sweep import cells_grid, failure_lines, sweep_lead

    if as_json:
        echo_json(report.to_json())
        return
    grid = cells_grid(report)
    named = [[c.model, *row[1:]] for c, row in zip(report.cells, grid.rows, strict=True)]
    print_rows(grid.header, named)
    for line in failure_lines(report):
        echo(line)
    echo(sweep_lead(report))


def _end(context: click.Context, report: SweepReport) -> None:
    if report.of_status("failed"):
        context.exit(1)
