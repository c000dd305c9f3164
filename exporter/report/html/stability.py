"""The stability report's page: maps of the scores, curves of how far the rankings agree."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from exporter.artifacts import KindStability, StabilityReport
from exporter.report.html.charts.lines import Line, LinePoint, lines_chart
from exporter.report.html.charts.series_heat import agreement_chart, series_heat_chart
from exporter.report.html.study import render_study
from exporter.report.html.view import Figure, Section
from exporter.report.parts.part import Block, Grid, Part
from exporter.report.parts.stability import (
    NOUNS,
    axis,
    column_names,
    is_series,
    places,
    stability_lead,
    stability_parts,
)
from exporter.report.words import significant

TITLES = {
    "checkpoints": "Importance over training",
    "texts": "Importance over calibration texts",
}
COLOURS = {
    "attention": "baseline",
    "mlp": "ref1",
    "block": "ref3",
    "cross_attention": "ref0",
    "mixer": "ref2",
}
"""As the kinds are coloured everywhere."""
_LONG_TABLE = 12


def render_stability(report: StabilityReport) -> str:
    """The page.

    Args:
        report: The series.
    """
    sections = [_section(part, report) for part in stability_parts(report)]
    first = report.points[0]
    subject = (
        f"{len(report.points)} checkpoints, on {first.calibration.source}"
        if report.over == "checkpoints"
        else f"{first.model.source}, on {len(report.points)} texts"
    )
    return render_study(
        command="stability",
        title=TITLES[report.over],
        subject=subject,
        lead=stability_lead(report),
        sections=sections,
        version=report.versions.get("depthcut", ""),
    )


def _section(part: Part, report: StabilityReport) -> Section:
    kind = next((kind for kind in report.kinds if kind.kind == part.key), None)
    figures = _summary_figures(report) if part.key == "summary" else []
    if kind is not None:
        figures = _kind_figures(report, kind)
    folded = [b for b in part.blocks if isinstance(b, Grid) and len(b.rows) > _LONG_TABLE]
    blocks: list[Block] = [block for block in part.blocks if block not in folded]
    return Section(part.key, part.title, figures, blocks, folded)


def _summary_figures(report: StabilityReport) -> list[Figure]:
    if not is_series(report):
        return []
    last = len(report.points) - 1
    charts: list[tuple[str, str, Callable[[KindStability, int], float | None], bool]] = [
        (
            "Rank correlation with the last point",
            "Spearman's correlation",
            lambda kind, at: 1.0 if at == last else kind.between(at, last).spearman,
            False,
        ),
        (
            "Rank correlation with the point before",
            "Spearman's correlation",
            lambda kind, at: kind.between(at - 1, at).spearman if at else None,
            False,
        ),
        (
            f"Median {report.metric} of each kind",
            report.metric,
            lambda kind, at: statistics.median(kind.scores[at]),
            True,
        ),
    ]
    return [
        Figure(
            lines_chart(
                f"summary-{number}", _lines(report, value), places(report), title=title,
                across=axis(report), up=up, logarithmic=by_ratio and _positive(report),
                limits=(None, None if by_ratio else 1.0),
            ),
            "Lower is more redundant." if by_ratio else "1: the same order.",
            title=title,
        )
        for number, (title, up, value, by_ratio) in enumerate(charts)
    ]  # fmt: skip


def _lines(
    report: StabilityReport, value: Callable[[KindStability, int], float | None]
) -> list[Line]:
    found = []
    for kind in report.kinds:
        points = []
        for at, point in enumerate(report.points):
            figure = value(kind, at)
            if figure is not None:
                tip = f"{NOUNS[kind.kind]}, {point.label}: {significant(figure, 3)}"
                points.append(LinePoint(at, figure, tip))
        found.append(Line(NOUNS[kind.kind], COLOURS[kind.kind], points))
    return found


def _positive(report: StabilityReport) -> bool:
    medians = (statistics.median(scores) for kind in report.kinds for scores in kind.scores)
    return all(median > 0 for median in medians)


def _mark_words(first: int) -> str:
    return f"{'the' if first == 1 else f'among the {first}'} most redundant of its column"


def _kind_figures(report: StabilityReport, kind: KindStability) -> list[Figure]:
    first, names = _marked(kind), column_names(report)
    what, values = NOUNS[kind.kind], [score for scores in kind.scores for score in scores]
    heat = Figure(
        series_heat_chart(f"{kind.kind}-map", kind, names, first, title=f"Scores of the {what}"),
        f"A row a layer; across: {_across(report, names)}.",
        [
            ("h0", f"redundant ({significant(min(values), 2)})"),
            ("h8", f"important ({significant(max(values), 2)})"),
            ("s-circle", _mark_words(first)),
        ],
        title=f"Scores of the {what}, by {report.metric}",
    )
    if is_series(report):
        return [heat]
    pairs = Figure(
        agreement_chart(
            f"{kind.kind}-pairs", kind, _labels(report), title="Agreement of each pair of texts"
        ),
        "Spearman's correlation; the stronger the colour, the nearer to 1. The table names the "
        "numbers.",
        title="Agreement of each pair of texts",
    )
    return [heat, pairs]


def _across(report: StabilityReport, names: Sequence[str]) -> str:
    named = not report.is_ordered and names == _labels(report)
    return f"the {report.over}" if named else axis(report)


def _labels(report: StabilityReport) -> Sequence[str]:
    return [point.label for point in report.points]


def _marked(kind: KindStability) -> int:
    """About a quarter of the layers: what a plan would drop."""
    return max((n for n in kind.always_first if 3 * n <= len(kind.layers)), default=1)
