"""A sweep's table on the terminal."""

from __future__ import annotations

import click

from exporter.artifacts import SweepReport
from exporter.cli.results import print_rows


def print_sweep(report: SweepReport, as_json: bool) -> None:
    """The whole report as JSON; else a line a cell, then what failed."""
    from exporter.report.parts.sweep import cells_grid, failure_lines, sweep_lead

    if as_json:
        click.echo(report.to_json(), nl=False)
        return
    grid = cells_grid(report)
    rows = [[cell if isinstance(cell, str) else cell.word for cell in row] for row in grid.rows]
    named = [[c.model, *row[1:]] for c, row in zip(report.cells, rows, strict=True)]
    print_rows(grid.header, named)
    for line in failure_lines(report):
        click.echo(line)
    click.echo(sweep_lead(report))
