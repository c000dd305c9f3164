"""The comparison as one table on a terminal, and as plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.artifacts import ComparisonReport
from exporter.printable import one_line
from exporter.report.parts.corners import corners_grid
from exporter.report.parts.part import Grid
from exporter.report.words import (
    HEADER,
    Row,
    accuracy_rows,
    dropped_lines,
    latency_rows,
    size_rows,
)

if TYPE_CHECKING:
    from rich.table import Table

_VERDICT_STYLES = {"faster": "bold green", "slower": "bold red", "same": "", "inconclusive": "dim"}


def comparison_table(report: ComparisonReport) -> Table:
    """A rich table: latency, accuracy and size in three sections."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Without edges the widest row, an inconclusive one, fits into 80 columns.
    table = Table(
        title=title(report),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column(HEADER[0], no_wrap=True)
    for name in HEADER[1:]:
        table.add_column(name, justify="right" if name != "verdict" else "left", no_wrap=True)
    for section in _sections(report):
        for row in section:
            style = _VERDICT_STYLES.get(row[4], "")
            table.add_row(*row[:4], Text(row[4], style=style))
        table.add_section()
    return table


def corners_table(report: ComparisonReport) -> Table | None:
    """A rich table of the four corners; None where the report has none."""
    from rich import box
    from rich.table import Table

    if not report.corners:
        return None
    grid = corners_grid(report, brief=True)
    table = Table(
        title=grid.caption, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False,
        pad_edge=False,
    )  # fmt: skip
    for column, name in enumerate(grid.header):
        table.add_column(name, justify="right" if column else "left", no_wrap=True)
    for row in _plain(grid):
        table.add_row(*row)
    return table


def plain_table(report: ComparisonReport) -> str:
    """The same rows as aligned text, for files and pipes; an empty line between sections."""
    sections = _sections(report)
    rows = [HEADER, *(row for section in sections for row in section)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    parts = [[title(report), _aligned(HEADER, widths)]]
    parts += [[_aligned(row, widths) for row in section] for section in sections]
    if report.corners:
        parts.append(_plain_corners(report))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _plain_corners(report: ComparisonReport) -> list[str]:
    grid = corners_grid(report, brief=True)
    rows = [list(grid.header), *_plain(grid)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return [f"{grid.caption}.", "", *("  ".join(line).rstrip() for line in lines)]


def _plain(grid: Grid) -> list[list[str]]:
    """Its rows as text."""
    return [
        [one_line(cell if isinstance(cell, str) else cell.word) for cell in row]
        for row in grid.rows
    ]


def title(report: ComparisonReport) -> str:
    """What the table compares, and where it was measured."""
    dropped = "; ".join(dropped_lines(report.plan))
    told = f"Dropped {dropped}" if dropped else "No deletions on record"
    arm, machine = report.arms.baseline, report.environment
    threads = f"{machine.threads} thread{'s' if machine.threads != 1 else ''}"
    weights = arm.quantization.scheme if arm.quantization else arm.precision
    where = one_line(f"{arm.backend}, {arm.provider}, {weights}, {threads}.")
    return f"{told}.\n{where}"


def _sections(report: ComparisonReport) -> list[list[Row]]:
    sections = [latency_rows(report), accuracy_rows(report), size_rows(report)]
    return [section for section in sections if section]


def _aligned(row: Row, widths: list[int]) -> str:
    first = row[0].ljust(widths[0])
    numbers = [cell.rjust(width) for cell, width in zip(row[1:4], widths[1:4], strict=True)]
    return "  ".join([first, *numbers, row[4]]).rstrip()
