"""`depthcut report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli.console import echo
from exporter.cli.options import ANY_PATH, EXISTING_FILE, verbosity_options

if TYPE_CHECKING:
    from exporter.report.files import Form


@click.command(short_help="Render saved reports again; nothing is measured.")
@click.argument("reports", type=EXISTING_FILE, nargs=-1, required=True)
@click.option(
    "--importance", type=EXISTING_FILE, metavar="FILE",
    help="The importance.json that the plan rests on, for the map of all layers.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=ANY_PATH, help="The file. [of one report: beside it, by its name]"
)
@click.option(
    "--format", "form", type=click.Choice(["html", "md"]), default="html", show_default=True
)
@verbosity_options
def report(
    *, reports: tuple[Path, ...], importance: Path | None, output: Path | None, form: Form
) -> None:
    """Render saved REPORTS again, as one HTML page or as Markdown; nothing is measured.

    Several report.json stand on one page, with one plot of what speed costs.
    """
    from exporter.report.files import render_saved

    echo(render_saved(reports, importance=importance, output=output, form=form))
