"""How far a series of rankings agrees: a summary, then each kind of sublayer point by point."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from exporter.artifacts import KindStability, SeriesAgreement, StabilityReport
from exporter.report.parts.part import Block, Bullets, Grid, Note, Part

NOUNS = {
    "attention": "attentions",
    "mlp": "MLPs",
    "block": "blocks",
    "cross_attention": "cross-attentions",
    "mixer": "mixers",
}
_COLUMN_CHARACTERS = 52
_MULTIPLES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def is_series(report: StabilityReport) -> bool:
    """Whether a point has one before it: over training, or over amounts of one text."""
    return report.over == "checkpoints" or report.is_ordered


def step_word(step: float) -> str:
    """A step or a number of tokens, short: ``1000`` as ``1k``, ``143000`` as ``143k``."""
    for size, letter in _MULTIPLES:
        if step >= size and round(step / size, 1) * size == step:
            return f"{step / size:g}{letter}"
    return f"{step:g}"


def places(report: StabilityReport) -> list[str]:
    """What the points are called on an axis: by their steps where they have some, else numbers."""
    if report.is_ordered:
        return [step_word(point.step or 0.0) for point in report.points]
    return [str(number) for number in range(1, len(report.points) + 1)]


def column_names(report: StabilityReport) -> list[str]:
    """The same, but by name where there are few enough points."""
    labels = [point.label for point in report.points]
    room = _COLUMN_CHARACTERS // len(labels)
    return places(report) if report.is_ordered or max(map(len, labels)) > room else labels


def axis(report: StabilityReport) -> str:
    """What the axis of the points is."""
    if report.over == "texts":
        return "tokens of the text" if report.is_ordered else "text, by its number below"
    return "training step" if report.is_ordered else "checkpoint, by its number below"


def stability_lead(report: StabilityReport) -> str:
    """The result in two sentences."""
    told = []
    for kind in report.kinds:
        values = [a.spearman for a in _compared(report, kind) if a.spearman is not None]
        if values:
            told.append(
                f"{NOUNS[kind.kind]} {statistics.mean(values):.2f} (lowest {min(values):.2f})"
            )
    what = "each point and the one before it" if is_series(report) else "each pair of texts"
    if not told:
        return "The scores tell too few sublayers apart for a rank correlation."
    return f"Rank correlation of {what}, by {report.metric}: {_listed(told)}."


def _compared(report: StabilityReport, kind: KindStability) -> list[SeriesAgreement]:
    """The pairs that the summary is about."""
    if not is_series(report):
        return kind.agreements
    return [kind.between(i, i + 1) for i in range(len(report.points) - 1)]


def stability_parts(report: StabilityReport) -> list[Part]:
    """Summary, each kind, and what the points are."""
    kinds = [
        Part(
            kind.kind,
            NOUNS[kind.kind].capitalize() if kind.kind != "mlp" else "MLPs",
            _kind(report, kind),
        )
        for kind in report.kinds
    ]
    return [_summary(report), *kinds, _points(report)]


def _summary(report: StabilityReport) -> Part:
    pairs = "neighbouring points" if is_series(report) else "each pair of texts"
    ends = ["first with last"] if is_series(report) else []
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
    return Part("summary", "Summary", [grid, note, *([Bullets(always)] if always else [])])


def _summary_row(report: StabilityReport, kind: KindStability, counts: Sequence[int]) -> list[str]:
    pairs = _compared(report, kind)
    spearman = [a.spearman for a in pairs if a.spearman is not None]
    kendall = [a.kendall for a in pairs if a.kendall is not None]
    ends = [_figure(kind.between(0, len(report.points) - 1).spearman)] if is_series(report) else []
    return [
        NOUNS[kind.kind],
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
    return f"{NOUNS[kind.kind]} among the first {n} at every point: {layers}"


def _kind(report: StabilityReport, kind: KindStability) -> list[Block]:
    if not is_series(report):
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
    caption = f"{NOUNS[kind.kind]}: each point beside the one before it, and beside the last"
    return Grid(caption, header, rows, right=range(1, len(header)))


def _overlaps(report: StabilityReport, kind: KindStability) -> Grid:
    counts, last = sorted(kind.always_first), len(report.points) - 1
    header = ["point", *(f"of first {n}" for n in counts)]
    rows = [
        [point.label, *(str(kind.between(at, last).shared_first[n]) for n in counts)]
        for at, point in enumerate(report.points[:-1])
    ]
    caption = f"{NOUNS[kind.kind]}: how many of the most redundant are so at the last point too"
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
    caption = f"{NOUNS[kind.kind]}: Spearman's correlation of each pair of texts"
    return Grid(caption, header, rows, right=range(1, count + 1))


def _pair(pair: SeriesAgreement, n: int | None) -> str:
    shared = f" ({pair.shared_first[n]})" if n else ""
    return _figure(pair.spearman) + shared


def _points(report: StabilityReport) -> Part:
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
    return Part("points", "Points", [grid])


def _figures(pair: SeriesAgreement | None) -> Iterable[str]:
    return ("", "") if pair is None else (_figure(pair.spearman), _figure(pair.kendall))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _count(value: int | None) -> str:
    return "" if value is None else str(value)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
