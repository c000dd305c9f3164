"""How studies look on standard output: their first table, and where the page is."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.artifacts import DepthsReport, ScoreComparison
from exporter.cli.console import echo, echo_json
from exporter.cli.results import print_rows
from exporter.printable import one_line
from exporter.report.sections.blocks import Bullets, Grid, Note

_WIDTH = 100


def print_study(
    report: ScoreComparison | DepthsReport, output: Path | None, *, as_json: bool
) -> None:
    """The summary of a study, or all of it as JSON."""
    from exporter.report.files import study_document, study_files

    if as_json:
        echo_json(report.to_json())
        return
    for block in study_document(report).sections[0].blocks:
        if isinstance(block, Grid):
            echo(f"{block.caption}.", "")
            print_rows(block.header, block.rows)
        elif isinstance(block, Note):
            text = one_line(f"{block.lead} {block.text}".strip())
            echo("", *click.wrap_text(text, _WIDTH).split("\n"))
        elif isinstance(block, Bullets):
            echo("", *block.lines)
    if output is not None:
        echo("", f"Page: {study_files(output)[2]}")
