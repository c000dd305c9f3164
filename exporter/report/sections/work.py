"""What both graphs consist of, counted: it doesn't depend on the machine."""

from __future__ import annotations

from collections.abc import Iterator

from exporter.artifacts import ComparisonReport, GraphWork
from exporter.report.sections.blocks import Block, Grid, Section
from exporter.report.words import WORK, relative_change


def work_section(report: ComparisonReport) -> Section | None:
    """Counted figures and nodes by operator of both arms; None where no graph was counted."""
    before, after = report.arms.baseline, report.arms.candidate
    if before.work is None or after.work is None:
        return None
    old, new = before.counted, after.counted
    rows = [
        [
            WORK[figure] + ", bytes" * figure.endswith("bytes"),
            f"{old[figure]:,}",
            f"{value:,}",
            relative_change(old[figure], value),
        ]
        for figure, value in new.items()
        if figure in old
    ]
    header = ["", "baseline", "candidate", "change"]
    blocks: list[Block] = [
        Grid("Counted from graph and engine, without a run", header, rows, right=(1, 2, 3))
    ]
    if kinds := list(_kinds(before.work, after.work)):
        header = ["operator", "baseline", "candidate"]
        blocks.append(Grid("Operators with other numbers of nodes", header, kinds, right=(1, 2)))
    return Section("work", "What is in the graphs", blocks)


def _kinds(before: GraphWork, after: GraphWork) -> Iterator[list[str]]:
    for kind in sorted({*before.nodes, *after.nodes}):
        old, new = before.nodes.get(kind, 0), after.nodes.get(kind, 0)
        if old != new:
            yield [kind, f"{old:,}", f"{new:,}"]
