"""How far a series of rankings agrees: a summary, then each kind of sublayer point by point."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from exporter.artifacts import KindStability, SeriesAgreement, StabilityReport
from exporter.report.charts.cells import CellMap, MapCell, Shades
from exporter.report.charts.lines import Line, LinePoint, Lines
from exporter.report.sections.blocks import Block, Bullets, Document, Figure, Grid, Note, Section
from exporter.report.words import KINDS, listed, or_dash, significant

_TITLES = {
    "checkpoints": "Importance over training",
    "texts": "Importance over calibration texts",
}
_PALE_SHADES = 5  # of all: numbers stand on them

_COLUMN_CHARACTERS = 52
_MULTIPLES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def _is_series(report: StabilityReport) -> bool:
    """Whether a point has one before it: over training, or over amounts of one text."""
    return report.over == "checkpoints" or report.is_ordered


def step_word(step: float) -> str:
    """A step or a number of tokens, short: ``1000`` as ``1k``, ``143000`` as ``143k``."""
    for size, letter in _MULTIPLES:
        if step >= size and round(step / size, 1) * size == step:
            return f"{step / size:g}{letter}"
    return f"{step:g}"


def _places(report: StabilityReport) -> list[str]:
    """What the points are called on an axis: by their steps where they have some, else numbers."""
    if report.is_ordered:
        return [step_word(point.step or 0.0) for point in report.points]
    return [str(number) for number in range(1, len(report.points) + 1)]


def _column_names(report: StabilityReport) -> list[str]:
    """The same, but by name where there are few enough points."""
    labels = [point.label for point in report.points]
    room = _COLUMN_CHARACTERS // len(labels)
    return _places(report) if report.is_ordered or max(map(len, labels)) > room else labels


def _axis(report: StabilityReport) -> str:
    """What the axis of the points is."""
    if report.over == "texts":
        return "tokens of the text" if report.is_ordered else "text, by its number below"
    return "training step" if report.is_ordered else "checkpoint, by its number below"


def stability_document(report: StabilityReport) -> Document:
    """Summary, each kind, and what the points are."""
    first = report.points[0]
    subject = (
        f"{len(report.points)} checkpoints, on {first.calibration.source}"
        if report.over == "checkpoints"
        else f"{first.model.source}, on {len(report.points)} texts"
    )
    kinds = []
    for kind in report.kinds:
        noun = KINDS[kind.kind].several
        title = f"{noun[0].upper()}{noun[1:]}"
        figures = _kind_figures(report, kind)
        kinds.append(Section(kind.kind, title, _kind(report, kind), figures))
    return Document(
        command="score --compare",
        version=report.versions.get("depthcut", ""),
        title=_TITLES[report.over],
        subject=subject,
        lead=_lead(report),
        sections=[_summary(report), *kinds, _points(report)],
    )


def _lead(report: StabilityReport) -> str:
    """The result in two sentences."""
    told = []
    for kind in report.kinds:
        values = [a.spearman for a in _compared(report, kind) if a.spearman is not None]
        if values:
            told.append(f"{_noun(kind)} {statistics.mean(values):.2f} (lowest {min(values):.2f})")
    what = "each point and the one before it" if _is_series(report) else "each pair of texts"
    if not told:
        return "The scores tell too few sublayers apart for a rank correlation."
    return f"Rank correlation of {what}, by {report.metric}: {listed(told)}."


def _noun(kind: KindStability) -> str:
    return KINDS[kind.kind].several


def _compared(report: StabilityReport, kind: KindStability) -> list[SeriesAgreement]:
    """The pairs that the summary is about."""
    if not _is_series(report):
        return kind.agreements
    return [kind.between(i, i + 1) for i in range(len(report.points) - 1)]


def _summary(report: StabilityReport) -> Section:
    pairs = "neighbouring points" if _is_series(report) else "each pair of texts"
    ends = ["first with last"] if _is_series(report) else []
    counts = sorted({n for kind in report.kinds for n in kind.always_first})
    header = [
        "kind", "Spearman, mean", "lowest", "on other text", "Kendall, mean", *ends,
        *(f"of {n}" for n in counts),
    ]  # fmt: skip
    rows = [_summary_row(report, kind, counts) for kind in report.kinds]
    grid = Grid(f"How far the rankings of {pairs} agree", header, rows, right=range(1, len(header)))
    always = [line for kind in report.kinds if (line := _always_line(kind))]
    note = Note(
        "Correlations are 1 for the same order and -1 for the opposite. On other text: what the "
        "same model would have on text of the same kind and amount, by the scores' standard "
        "errors, at the point where that is least; what agrees as well may differ by chance alone. "
        "Of n: how many of the n most redundant are the same at every point."
    )
    bullets = [Bullets(always)] if always else []
    return Section("summary", "Summary", [grid, note, *bullets], [*_summary_figures(report)])


def _summary_figures(report: StabilityReport) -> Iterator[Figure]:
    if not _is_series(report):
        return
    last, spearman = len(report.points) - 1, "Spearman's correlation"
    for title, value in (
        ("Rank correlation with the last point",
         lambda kind, at: 1.0 if at == last else kind.between(at, last).spearman),
        ("Rank correlation with the point before",
         lambda kind, at: kind.between(at - 1, at).spearman if at else None),
    ):  # fmt: skip
        lines = _lines(report, value)
        chart = Lines(title, lines, _axis(report), spearman, _places(report), limits=(1.0,))
        yield Figure(chart, "1: the same order.", title=title)
    title = f"Median {report.metric} of each kind"
    lines = _lines(report, lambda kind, at: statistics.median(kind.scores[at]))
    positive = all(point.value > 0 for line in lines for point in line.points)
    chart = Lines(title, lines, _axis(report), report.metric, _places(report), logarithmic=positive)
    yield Figure(chart, "Lower is more redundant.", title=title)


def _lines(
    report: StabilityReport, value: Callable[[KindStability, int], float | None]
) -> list[Line]:
    lines = []
    for kind in report.kinds:
        points = []
        for at, point in enumerate(report.points):
            if (figure := value(kind, at)) is not None:
                tip = f"{_noun(kind)}, {point.label}: {significant(figure, 3)}"
                points.append(LinePoint(at, figure, tip))
        lines.append(Line(_noun(kind), KINDS[kind.kind].colour, points))
    return lines


def _summary_row(report: StabilityReport, kind: KindStability, counts: Sequence[int]) -> list[str]:
    pairs = _compared(report, kind)
    spearman = [a.spearman for a in pairs if a.spearman is not None]
    kendall = [a.kendall for a in pairs if a.kendall is not None]
    ends = [_figure(kind.between(0, len(report.points) - 1).spearman)] if _is_series(report) else []
    return [
        _noun(kind),
        _figure(statistics.mean(spearman) if spearman else None),
        _figure(min(spearman, default=None)),
        _figure(min((r for r in kind.repeatability if r is not None), default=None)),
        _figure(statistics.mean(kendall) if kendall else None),
        *ends,
        *(_count(len(kind.always_first[n]) if n in kind.always_first else None) for n in counts),
    ]


def _always_line(kind: KindStability) -> str:
    """The layers that a plan could drop whichever point it was made at."""
    n = _half(kind)
    if n is None or not kind.always_first[n]:
        return ""
    layers = ", ".join(map(str, kind.always_first[n]))
    return f"{_noun(kind)} among the first {n} at every point: {layers}"


def _kind(report: StabilityReport, kind: KindStability) -> list[Block]:
    if not _is_series(report):
        n = _half(kind)
        note = Note(f"In brackets how many of the first {n} are the same.")
        return [_matrix_grid(report, kind, n), *([note] if n else [])]
    overlaps = [_overlaps(report, kind)] if kind.always_first else []
    return [_correlations(report, kind), *overlaps]


def _correlations(report: StabilityReport, kind: KindStability) -> Grid:
    header = ["point", "Spearman, before", "Kendall", "Spearman, last", "Kendall"]
    last = len(report.points) - 1
    rows = [
        [
            point.label,
            *_figures(kind.between(at - 1, at) if at else None),
            *_figures(kind.between(at, last) if at < last else None),
        ]
        for at, point in enumerate(report.points)
    ]
    caption = f"{_noun(kind)}: each point beside the one before it, and beside the last"
    return Grid(caption, header, rows, right=range(1, len(header)))


def _overlaps(report: StabilityReport, kind: KindStability) -> Grid:
    counts, last = sorted(kind.always_first), len(report.points) - 1
    header = ["point", *(f"of first {n}" for n in counts)]
    rows = [
        [point.label, *(str(kind.between(at, last).shared_first[n]) for n in counts)]
        for at, point in enumerate(report.points[:-1])
    ]
    caption = f"{_noun(kind)}: how many of the most redundant are so at the last point too"
    return Grid(caption, header, rows, right=range(1, len(header)))


def _half(kind: KindStability) -> int | None:
    """The largest of the told numbers of first ones that is no more than half of the layers."""
    return max((n for n in kind.always_first if 2 * n <= len(kind.layers)), default=None)


def _matrix_grid(report: StabilityReport, kind: KindStability, n: int | None) -> Grid:
    count = len(report.points)
    header = ["text", *(str(number + 1) for number in range(count))]
    rows = []
    for row, point in enumerate(report.points):
        cells = (
            "" if row == column else _pair(kind.between(row, column), n) for column in range(count)
        )
        rows.append([f"{row + 1}: {point.label}", *cells])
    caption = f"{_noun(kind)}: Spearman's correlation of each pair of texts"
    return Grid(caption, header, rows, right=range(1, count + 1))


def _pair(pair: SeriesAgreement, n: int | None) -> str:
    shared = f" ({pair.shared_first[n]})" if n else ""
    return _figure(pair.spearman) + shared


def _points(report: StabilityReport) -> Section:
    what = "checkpoint" if report.over == "checkpoints" else "text"
    header = ["point", "step" if what == "checkpoint" else "tokens", "model", "text", "samples"]
    rows = [
        [
            f"{number}: {point.label}",
            "-" if point.step is None else f"{point.step:,.10g}",
            f"{point.model.source} ({point.model.sha256[:12]})",
            f"{point.calibration.source} ({point.calibration.sha256[:12]})",
            f"{point.calibration.samples} x {point.calibration.sequence_length}",
        ]
        for number, point in enumerate(report.points, start=1)
    ]
    grid = Grid(f"Each {what}", header, rows, right=(1, 4))
    return Section("points", "Points", [grid])


def _figures(pair: SeriesAgreement | None) -> tuple[str, str]:
    return ("", "") if pair is None else (_figure(pair.spearman), _figure(pair.kendall))


def _figure(value: float | None) -> str:
    return or_dash(value, "{:.3f}".format)


def _count(value: int | None) -> str:
    return "" if value is None else str(value)


def _kind_figures(report: StabilityReport, kind: KindStability) -> list[Figure]:
    first, names = _marked(kind), _column_names(report)
    labels = [point.label for point in report.points]
    named = not report.is_ordered and names == labels
    across = f"the {report.over}" if named else _axis(report)
    values = [score for scores in kind.scores for score in scores]
    most = "the" if first == 1 else f"among the {first}"
    legend = [
        ("h0", f"redundant ({significant(min(values), 2)})"),
        ("h8", f"important ({significant(max(values), 2)})"),
        ("s-circle", f"{most} most redundant of its column"),
    ]
    title = f"Scores of the {_noun(kind)}, by {report.metric}"
    told = f"A row a layer; across: {across}."
    scores = Figure(_score_map(kind, names, first), told, legend, title)
    if _is_series(report):
        return [scores]
    told = (
        "Spearman's correlation; the stronger the colour, the nearer to 1. The table names the "
        "numbers."
    )
    title = "Agreement of each pair of texts"
    return [scores, Figure(_agreement_map(kind, labels, title), told, title=title)]


def _score_map(kind: KindStability, columns: Sequence[str], first: int) -> CellMap:
    """Layers down, points across; a dot marks what is among the first so many at a point."""
    shade = Shades([score for scores in kind.scores for score in scores])
    cells: dict[tuple[int, int], MapCell] = {}
    lowest = []
    for column, scores in enumerate(kind.scores):
        order = sorted(range(len(scores)), key=lambda index: (scores[index], index))
        lowest.append(f"{columns[column]}: {', '.join(str(kind.layers[i]) for i in order[:4])}")
        for rank, row in enumerate(order, start=1):
            name = f"{columns[column]}, {KINDS[kind.kind].short} {kind.layers[row]}"
            tip = f"{name}: {significant(scores[row], 3)}, {rank} of {len(scores)}"
            cells[row, column] = MapCell(f"h{shade(scores[row])}", tip, dotted=rank <= first)
    return CellMap(
        f"Scores of the {_noun(kind)}",
        f"The four most redundant layers at each point. {'; '.join(lowest)}.",
        [str(layer) for layer in kind.layers],
        columns,
        cells,
        widest=80.0,
        tallest=14.0,
        most_across=len(columns),
    )


def _agreement_map(kind: KindStability, labels: Sequence[str], title: str) -> CellMap:
    """Spearman's correlation of each two points with its number; points have numbers, too."""
    told = [pair.spearman for pair in kind.agreements if pair.spearman is not None]
    least = min([*told, 0.99])
    cells: dict[tuple[int, int], MapCell] = {}
    words = []
    for pair in kind.agreements:
        value = or_dash(pair.spearman, "{:.2f}".format)
        share = 0.0 if pair.spearman is None else (pair.spearman - least) / (1 - least)
        words.append(f"{labels[pair.first]} and {labels[pair.second]}: {value}")
        cell = MapCell(f"h{round(share * (_PALE_SHADES - 1))}", words[-1], value)
        cells |= {(pair.first, pair.second): cell, (pair.second, pair.first): cell}
    numbers = [str(number + 1) for number in range(len(labels))]
    told_all = "; ".join(words) + "."
    return CellMap(
        title, told_all, numbers, numbers, cells, widest=44.0, tallest=44.0,
        most_across=len(labels),
    )  # fmt: skip


def _marked(kind: KindStability) -> int:
    """About a quarter of the layers: what a plan would drop."""
    return max((n for n in kind.always_first if 3 * n <= len(kind.layers)), default=1)
