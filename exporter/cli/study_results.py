"""How studies look on standard output: their first table, and where the page is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.artifacts import DepthsReport, StabilityReport
from exporter.cli.console import echo, echo_json
from exporter.printable import one_line

if TYPE_CHECKING:
    from exporter.report.parts.part import Document

_WIDTH = 100


def print_stability(report: StabilityReport, output: Path, *, as_json: bool) -> None:
    """The summary, or all of it as JSON."""
    from exporter.report.parts.stability import stability_document

    if as_json:
        echo_json(report.to_json())
    else:
        _print_study(stability_document(report), output)


def print_depths(report: DepthsReport, output: Path, *, as_json: bool) -> None:
    """The overview, or all of it as JSON."""
    from exporter.report.parts.depths import depths_document

    if as_json:
        echo_json(report.to_json())
    else:
        _print_study(depths_document(report), output)


def _print_study(document: Document, output: Path) -> None:
    from exporter.cli.results import print_rows
    from exporter.report.files import study_files
    from exporter.report.parts.part import Bullets, Grid, Note

    for block in document.parts[0].blocks:
        if isinstance(block, Grid):
            echo(f"{block.caption}.", "")
            print_rows(block.header, block.rows)
        elif isinstance(block, Note):
            echo("", *click.wrap_text(one_line(block.text), _WIDTH).split("\n"))
        elif isinstance(block, Bullets):
            echo("", *block.lines)
    echo("", f"Page: {study_files(output)[2]}")
