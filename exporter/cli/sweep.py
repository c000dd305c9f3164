"""`depthcut sweep`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from exporter.artifacts import SweepReport
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.results import print_rows
from exporter.models.loading.checked_folder import Dangers
from exporter.models.loading.sources import SourceOptions
from exporter.option_types import InputFile, OutputFolder
from exporter.options import Options, argument, dataclass, option, part, required
from exporter.pipeline.sweep.schema import read_sweep
from exporter.report.sections.sweep import cells_grid, failure_lines, sweep_lead
from exporter.score.cluster.options import ClusterOptions

if TYPE_CHECKING:
    from exporter.pipeline.sweep.run import Runner


@dataclass(frozen=True, kw_only=True)
class SweepCall(Options):
    """What `depthcut sweep` is asked to do."""

    file: InputFile = argument("FILE.yaml")
    output: OutputFolder = required("Folder for all results.", "-o", "--output")
    dry_run: bool = option(False, "Check the file and list what would run; run nothing.")
    redo: bool = option(False, "Run every cell again, with all of its stages.")
    load: SourceOptions = part(SourceOptions(), without=("dtype", "revision"))
    cluster: ClusterOptions | None = part(switch="address")


@command(SweepCall)
def sweep(call: SweepCall, progress: ConsoleProgress) -> int:
    """Run `depthcut export` for every model with every plan in every precision of a file.

    Stages that cells share run once. Finished cells whose settings have not changed are kept; the
    others run one after the other, each in its own process, or with --ray each on its own machine.
    If a cell fails, the table says so, the others still run, and the exit code is 2. The output
    folder holds sweep.json, sweep.md and sweep.html, and a folder for each cell.
    """
    from exporter.pipeline.sweep.run import look, run_sweep

    asked, load = read_sweep(call.file), call.load
    dangers = Dangers(load.trust_remote_code, load.allow_pickle, load.allow_any_model_type)
    if call.dry_run:
        report = look(asked, call.output, dangers=dangers, force=call.redo)
    else:
        report = run_sweep(
            asked,
            call.output,
            runner=_runner(call.cluster),
            dangers=dangers,
            force=call.redo,
            progress=progress,
        )
    _print(report, progress.as_json)
    if not (call.dry_run or progress.as_json):
        echo(f"Report: {call.output / 'sweep.html'}")
    return 2 if report.of_status("failed") else 0


def _runner(cluster: ClusterOptions | None) -> Runner:
    """What runs the cells: this machine, or those of a cluster."""
    from exporter.pipeline.sweep.job import run_in_children
    from exporter.pipeline.sweep.run import run_on_ray

    if cluster is None:
        return run_in_children
    return partial(run_on_ray, address=cluster.address, workers=cluster.workers)


def _print(report: SweepReport, as_json: bool) -> None:
    """The whole report as JSON; else a line a cell, then what failed."""
    if as_json:
        echo_json(report.to_json())
        return
    grid = cells_grid(report)
    named = [[c.model, *row[1:]] for c, row in zip(report.cells, grid.rows, strict=True)]
    print_rows(grid.header, named)
    for line in failure_lines(report):
        echo(line)
    echo(sweep_lead(report))
