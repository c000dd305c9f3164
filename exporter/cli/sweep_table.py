"""A sweep's table on the terminal."""

from __future__ import annotations

from exporter.artifacts import SweepReport
from exporter.cli.console import echo, echo_json
from exporter.cli.results import print_rows


def print_sweep(report: SweepReport, as_json: bool) -> None:
    """The whole report as JSON; else a line a cell, then what failed."""
    from exporter.report.parts.sweep import cells_grid, failure_lines, sweep_lead

    if as_json:
        echo_json(report.to_json())
        return
    grid = cells_grid(report)
    named = [[c.model, *row[1:]] for c, row in zip(report.cells, grid.rows, strict=True)]
    print_rows(grid.header, named)
    for line in failure_lines(report):
        echo(line)
    echo(sweep_lead(report))
