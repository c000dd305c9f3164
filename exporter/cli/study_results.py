"""How studies look on standard output: their first table, and where the page is."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.artifacts import DepthsReport, StabilityReport
from exporter.cli.console import echo, echo_json
from exporter.printable import one_line
from exporter.report.parts.part import Grid, Part

_WIDTH = 100


def print_stability(report: StabilityReport, output: Path, *, as_json: bool) -> None:
    """The summary, or all of it as JSON."""
    from exporter.report.parts.stability import stability_parts

    if as_json:
        echo_json(report.to_json())
    else:
        _print_study(stability_parts(report)[0], output)


def print_depths(report: DepthsReport, output: Path, *, as_json: bool) -> None:
    """The overview, or all of it as JSON."""
    from exporter.report.parts.depths import depths_parts

    if as_json:
        echo_json(report.to_json())
    else:
        _print_study(depths_parts(report)[0], output)


def _print_study(part: Part, output: Path) -> None:
    from exporter.cli.results import print_rows
    from exporter.report.parts.part import Bullets, Note
    from exporter.report.studies import study_files

    for block in part.blocks:
        if isinstance(block, Grid):
            echo(f"{block.caption}.", "")
            rows = [[c if isinstance(c, str) else c.word for c in row] for row in block.rows]
            print_rows(block.header, rows)
        elif isinstance(block, Note):
            echo("", *click.wrap_text(one_line(block.text), _WIDTH).split("\n"))
        elif isinstance(block, Bullets):
            echo("", *block.lines)
    echo("", f"Page: {study_files(output)[2]}")
