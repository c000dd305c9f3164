"""Reports, plans and scores as a notebook shows them."""

from __future__ import annotations

from dataclasses import replace

from exporter.artifacts import (
    CheckReport,
    ComparisonReport,
    DepthsReport,
    ImportanceReport,
    PruneReport,
    PruningPlan,
)
from exporter.artifacts.base import Artifact
from exporter.printable import significant, visible
from exporter.report.ci import check_grid, conclusion
from exporter.report.files import html_environment
from exporter.report.sections.blocks import Block, Bullets, Grid
from exporter.report.sections.depths import depths_document
from exporter.report.sections.verdict import headline
from exporter.report.terminal import comparison_grids
from exporter.report.words import KINDS, dropped_lines


def cell(artifact: Artifact) -> str | None:
    """The artifact's tables as HTML; None for a kind that has none, which is shown as text."""
    match artifact:
        case ComparisonReport():
            return _html(headline(artifact), *map(_dense, comparison_grids(artifact)))
        case CheckReport():
            return _html(conclusion(artifact), check_grid(artifact))
        case DepthsReport():
            answer = depths_document(artifact).sections[0]
            return _html(answer.title, *answer.blocks)
        case ImportanceReport():
            return _html(f"Importance of {artifact.model.source}", _scores(artifact))
        case PruningPlan():
            return _html("A cut without", Bullets(dropped_lines(artifact.deletions)))
        case PruneReport():
            return _html(f"Cut: {artifact.target}", _sizes(artifact))
        case _:
            return None


def _html(title: str, *blocks: Block) -> str:
    template = html_environment().get_template("cell.html.j2")
    return visible(template.render(title=title, blocks=blocks))


def _dense(grid: Grid) -> Grid:
    return replace(grid, rows=[row for row in grid.rows if row])


def _scores(report: ImportanceReport) -> Grid:
    """A row a layer, a column a kind: the lowest score is the first to go."""
    kinds = list(dict.fromkeys(score.kind for score in report.scores))
    layers: dict[int, dict[str, str]] = {}
    for score in report.scores:
        layers.setdefault(score.layer, {})[score.kind] = significant(score.score, 3)
    rows = [[str(n), *(row.get(kind, "-") for kind in kinds)] for n, row in sorted(layers.items())]
    header = ["layer", *(KINDS[kind].several for kind in kinds)]
    return Grid(f"Scores by {report.metric}", header, rows, right=range(len(header)))


def _sizes(report: PruneReport) -> Grid:
    sizes = zip(report.before, report.after, strict=True)
    rows = [[name, f"{before:,}", f"{after:,}"] for (name, before), (_, after) in sizes]
    return Grid("The graph", ("", "before", "after"), rows, right=(1, 2))
