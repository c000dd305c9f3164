"""report.md: the comparison for people, the verdict first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from exporter.artifacts import ComparisonReport, ImportanceReport
from exporter.report.markdown_text import escaped, fenced, target
from exporter.report.parts import all_parts
from exporter.report.parts.overview import overview_grid
from exporter.report.parts.part import Block, Bullets, Cell, Command, Grid, Link, Note, Part, Sign
from exporter.report.verdict import verdict_sentence
from exporter.report.words import headline, verdict_sentences


def render(report: ComparisonReport, importance: ImportanceReport | None = None) -> str:
    """The whole report as Markdown (GitHub's tables), with the importance where it is known."""
    parts = [_verdict(report), *map(render_part, all_parts(report, importance))]
    return "\n\n".join(parts) + "\n"


def render_all(
    reports: Mapping[str, ComparisonReport], importance: ImportanceReport | None = None
) -> str:
    """Several reports by name, a table of all of them first; one is as :func:`render` has it."""
    whole = [render(report, importance) for report in reports.values()]
    if len(whole) == 1:
        return whole[0]
    overview = Part("overview", "All candidates", [overview_grid(reports)])
    return "\n".join([render_part(overview) + "\n", *whole])


def render_study_text(title: str, lead: str, parts: Sequence[Part]) -> str:
    """A study as Markdown: its result in a sentence, then its parts."""
    return "\n\n".join([f"# {escaped(title)}", escaped(lead), *map(render_part, parts)]) + "\n"


def _verdict(report: ComparisonReport) -> str:
    lines = [f"- {escaped(sentence)}" for sentence in verdict_sentences(report)]
    told = escaped(verdict_sentence(report))
    head = f"**{escaped(headline(report))}:**"
    return "\n".join(["# depthcut comparison", "", told, "", head, "", *lines])


def render_part(part: Part) -> str:
    """One section: its heading and its blocks. Captions stand where there are several tables."""
    several = sum(isinstance(block, Grid) for block in part.blocks) > 1
    lines = [f"## {escaped(part.title)}"]
    for block in part.blocks:
        if several and isinstance(block, Grid):
            lines += ["", f"{escaped(block.caption)}:"]
        lines += ["", *_block(block)]
    return "\n".join(lines)


def _block(block: Block) -> Iterator[str]:
    match block:
        case Grid():
            yield from _table(block)
        case Note(text, lead):
            told = escaped(text, own_marks=True)
            yield f"**{escaped(lead)}** {told}" if lead else told
        case Bullets(lines):
            yield from (f"- {escaped(line, own_marks=True)}" for line in lines)
        case Command(text):
            yield from fenced(text, "sh")


def _table(grid: Grid) -> Iterator[str]:
    yield _row(grid.header)
    rule = ["---:" if column in grid.right else "---" for column in range(len(grid.header))]
    yield _row(rule)
    yield from map(_row, grid.rows)


def _row(cells: Sequence[Cell]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(cell: Cell) -> str:
    if isinstance(cell, Link):
        return f"[{escaped(cell.word)}]({target(cell.target)})"
    return f"**{escaped(cell.word)}**" if isinstance(cell, Sign) else escaped(cell)
