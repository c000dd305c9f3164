"""How results look on standard output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from pydantic_core import to_json

from exporter.artifacts import Artifact, ComparisonReport, DepthsReport, ScoreComparison
from exporter.artifacts.servers import ServingRow
from exporter.cli.console import echo, echo_json
from exporter.printable import one_line, printable

if TYPE_CHECKING:
    from exporter.report.sections.blocks import Cell


def print_result(value: object, as_json: bool, *lines: object) -> None:
    """All of it as JSON, or lines."""
    if as_json and isinstance(value, Artifact):
        echo_json(value.to_json())
    elif as_json:
        echo_json(to_json(value, indent=2).decode())
    else:
        echo(*lines)


def print_comparison(report: ComparisonReport, folder: Path, as_json: bool) -> None:
    """The comparison's tables, and the report's path."""
    if as_json:
        print_result(report, as_json)
        return
    from exporter.report.terminal import comparison_grids, plain_text

    click.echo(printable(plain_text(comparison_grids(report))))
    echo(f"Report: {folder / 'report.html'}{_more_there(report)}")


def _more_there(report: ComparisonReport) -> str:
    """What was measured beside the table's rows, so that nobody looks for it there."""
    accuracy = report.accuracy
    more = {
        "references": len(report.arms.references) + 2 > max(2, len(report.corners)),
        "tasks": accuracy and accuracy.tasks,
    }
    text = ", ".join(name for name, value in more.items() if value)
    return f" (with more than the table: {text})" if text else ""


def print_serving(rows: Sequence[ServingRow]) -> None:
    """Which runtimes can hold what of a model, and a plan."""
    header = ["runtime", "form", "an attention", "an MLP", "attention 0", "the plan"]
    names = [
        [row.runtime, row.form, row.attention, row.mlp, row.first, row.problem or "yes"]
        for row in rows
    ]
    echo("What may become of a sublayer in each runtime (whole blocks can go everywhere):")
    echo(*table_lines(header, names))


def table_lines(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    """A plain table: columns padded to their widest cell."""
    from exporter.report.terminal import plain_lines

    return plain_lines(header, rows)


_WIDTH = 100


def print_study(
    report: ScoreComparison | DepthsReport, output: Path | None, *, as_json: bool
) -> None:
    """The summary of a study, or all of it as JSON."""
    from exporter.report.files import study_document, study_files
    from exporter.report.sections.blocks import Bullets, Grid, Note

    if as_json:
        print_result(report, as_json)
        return
    for block in study_document(report).sections[0].blocks:
        if isinstance(block, Grid):
            echo(f"{block.caption}.", "")
            echo(*table_lines(block.header, block.rows))
        elif isinstance(block, Note):
            text = one_line(f"{block.lead} {block.text}".strip())
            echo("", *click.wrap_text(text, _WIDTH).split("\n"))
        elif isinstance(block, Bullets):
            echo("", *block.lines)
    if output is not None:
        echo("", f"Page: {study_files(output)[2]}")
