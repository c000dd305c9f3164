"""Tables on a terminal, in files and in pipes: aligned with spaces."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, zip_longest

from exporter.artifacts import ComparisonReport
from exporter.printable import counted, one_line
from exporter.report.sections.blocks import Cell, Grid, plain
from exporter.report.sections.latency import corners_grid
from exporter.report.sections.summary import (
    HEADER,
    accuracy_rows,
    answer_grids,
    latency_rows,
    size_rows,
    task_rows,
)
from exporter.report.words import dropped_lines, named_arms

_WIDTH, _PROSE_WIDTH = 80, 25  # three columns of prose fit


def comparison_grids(report: ComparisonReport) -> list[Grid]:
    """Latency, accuracy, tasks, size in one table; corners; what the arms say."""
    rows: list[Sequence[Cell]] = []
    accuracy = accuracy_rows(report)
    parts = (latency_rows(report), accuracy, task_rows(report), size_rows(report))
    for section in filter(None, parts):
        rows += [[]] if rows else []
        rows += section
    grids = [Grid(comparison_title(report), HEADER, rows, right=(1, 2, 3))]
    corners = _narrow(corners_grid(report)) if report.corners else []
    return [*grids, *corners, *answer_grids(report, brief=True)]


def cut_lines(report: ComparisonReport) -> Iterator[tuple[str, str, str]]:
    """Paths of the whole model and of each cut, and what was measured of that."""
    paths = {name: arm.path for name, arm in named_arms(report).items()}
    if not report.corners:
        rows = [*latency_rows(report), *accuracy_rows(report)[:1], *size_rows(report)[:1]]
        measured = ", ".join(f"{row[0].removesuffix(', ms')} {row[3]}" for row in rows)
        yield paths["baseline"], paths["candidate"], measured
        return
    grid = corners_grid(report)
    corners = sorted(report.corners, key=lambda corner: corner.quantized)
    for corner, (name, *cells) in zip(corners, grid.rows, strict=True):
        if corner.pruned:
            pairs = zip(grid.header[1:], map(plain, cells), strict=True)
            measured = f"{plain(name)}: " + ", ".join(map(" ".join, pairs))
            yield paths[corners[0].arm], paths[corner.arm], measured


def _narrow(grid: Grid) -> list[Grid]:
    """A table as several that fit into 80 columns, all of them with its first column."""
    lines = (map(plain, row) for row in (grid.header, *grid.rows))
    columns = [*zip(*lines, strict=True)]
    widths = [max(map(len, column)) + 2 for column in columns]
    parts, left = list[list[int]](), 0
    for column, width in enumerate(widths[1:], start=1):
        if not parts or width > left:
            parts, left = [*parts, [0]], _WIDTH + 2 - widths[0]
        parts[-1].append(column)
        left -= width
    tables = ([*zip(*(columns[c] for c in part), strict=True)] for part in parts)
    return [
        Grid(grid.caption, header, rows, right=range(1, len(header))) for header, *rows in tables
    ]


def comparison_title(report: ComparisonReport) -> str:
    """What the table compares, and where it was measured."""
    dropped = "; ".join(dropped_lines(report.plan))
    text = f"Dropped {dropped}" if dropped else "No deletions on record"
    arm, threads = report.arms.baseline, counted(report.environment.threads, "thread")
    weights = arm.quantization.scheme if arm.quantization else arm.precision
    where = one_line(f"{arm.backend}, {arm.provider}, {weights}, {threads}.")
    return f"{text}.\n{where}"


def plain_lines(
    header: Sequence[str], rows: Iterable[Sequence[Cell]], right: Sequence[int] = ()
) -> list[str]:
    """Rows as aligned text; an empty row is an empty line."""
    table = [[one_line(plain(cell)) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*filter(None, table), strict=True)]

    def aligned(row: Sequence[str]) -> str:
        cells = enumerate(zip(row, widths, strict=True)) if row else ()
        padded = (c.rjust(width) if n in right else c.ljust(width) for n, (c, width) in cells)
        return "  ".join(padded).rstrip()

    return [aligned(row) for row in table]


def plain_text(grids: Iterable[Grid]) -> str:
    """Tables below one another, each below its caption."""
    texts = []
    for grid in grids:
        rows = chain.from_iterable(map(_wrapped, grid.rows)) if grid.is_prose else grid.rows
        header, *lines = plain_lines(grid.header, rows, grid.right)
        texts.append("\n".join([grid.caption, header, "", *lines]))
    return "\n\n".join(texts) + "\n"


def _wrapped(row: Sequence[Cell]) -> Iterator[list[str]]:
    """A row of sentences as rows of short lines; an empty row as it is."""
    lines = [textwrap.wrap(one_line(plain(cell)), _PROSE_WIDTH) for cell in row]
    yield from map(list, zip_longest(*lines, fillvalue="")) if row else [[]]
