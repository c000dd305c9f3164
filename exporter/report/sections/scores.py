"""Scores side by side: how far rankings agree, and every score by layer and ranking."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exporter.artifacts import RankAgreement, RankedScores, RankingRef, ScoreComparison
from exporter.report.charts.cells import CellMap, MapCell, Shades
from exporter.report.sections.blocks import Block, Document, Figure, Grid, Note, Section
from exporter.report.words import KINDS, or_dash, significant

_FEW_FILES = 2
_CORRELATIONS = "Correlations are 1 for the same order and -1 for the opposite."


def scores_document(comparison: ScoreComparison) -> Document:
    """The agreement of the rankings, then the scores of each kind of sublayer."""
    names = _names(comparison)
    ranked: dict[str, list[RankedScores]] = {}
    for ranking in comparison.scores:
        ranked.setdefault(ranking.kind, []).append(ranking)
    models = list(dict.fromkeys(model.source for model in comparison.models.values()))
    return Document(
        command="score --compare",
        version=comparison.versions.get("depthcut", ""),
        title="Importance side by side",
        subject=", ".join(models),
        lead="",
        sections=[
            Section("summary", "Agreement", _agreements(comparison, names)),
            *(_of_kind(kind, rankings, names) for kind, rankings in ranked.items()),
            Section("files", "Files", [_files(comparison)]),
        ],
    )


def _agreements(comparison: ScoreComparison, names: dict[RankingRef, str]) -> list[Block]:
    """Pair by pair; of many files Spearman's correlation of each with each."""
    if len(comparison.texts) > _FEW_FILES:
        return [_matrix(comparison, names), Note(_CORRELATIONS)]
    counts = sorted({n for pair in comparison.agreements for n in pair.shared_first})
    header = ["kind", "ranking", "compared with", "Spearman", "Kendall"]
    rows = [
        [
            pair.kind,
            names[pair.first],
            names[pair.second],
            _figure(pair.spearman),
            _figure(pair.kendall),
            *(str(pair.shared_first.get(n, "-")) for n in counts),
        ]
        for pair in comparison.agreements
    ]
    header += [f"of first {n}" for n in counts]
    note = f"{_CORRELATIONS} Of first n: how many of the n most redundant are the same."
    grid = Grid("How far the rankings agree", header, rows, right=range(3, len(header)))
    return [grid, Note(note)]


def _matrix(comparison: ScoreComparison, names: dict[RankingRef, str]) -> Grid:
    pairs: dict[tuple[str, RankingRef], list[RankAgreement]] = {}
    for pair in comparison.agreements:
        pairs.setdefault((pair.kind, pair.first), []).append(pair)
    columns = list(dict.fromkeys(pair.second for pair in comparison.agreements))
    rows = []
    for (kind, first), row in pairs.items():
        values = {pair.second: _figure(pair.spearman) for pair in row}
        rows.append([kind, names[first], *(values.get(column, "") for column in columns)])
    header = ["kind", "", *(names[column] for column in columns)]
    caption = "Spearman's correlation of each pair of rankings"
    return Grid(caption, header, rows, right=range(2, len(header)))


def _of_kind(kind: str, rankings: Sequence[RankedScores], names: dict[RankingRef, str]) -> Section:
    columns = [names[ranking.ranking] for ranking in rankings]
    layers = sorted({layer for ranking in rankings for layer in ranking.scores})
    rows = [
        [str(layer), *(or_dash(r.scores.get(layer), lambda v: significant(v, 3)) for r in rankings)]
        for layer in layers
    ]
    title = f"Scores of the {KINDS[kind].several}"
    grid = Grid(title, ["layer", *columns], rows, right=range(len(columns) + 1))
    chart = _map(title, rankings, columns, layers)
    legend = [("h0", "redundant"), ("h8", "important"), ("s-circle", "its column's first quarter")]
    figure = Figure(chart, "A row a layer.", legend, title)
    return Section(kind, title, [grid], [figure])


def _map(
    title: str, rankings: Sequence[RankedScores], columns: Sequence[str], layers: Sequence[int]
) -> CellMap:
    """Layers down, rankings across; shades are each metric's own."""
    values: dict[str, list[float]] = {}
    for ranking in rankings:
        values.setdefault(ranking.ranking.metric, []).extend(ranking.scores.values())
    shades = {metric: Shades(scores) for metric, scores in values.items()}
    cells, lowest = {}, []
    for column, ranking in enumerate(rankings):
        order = sorted(ranking.scores, key=lambda layer: (ranking.scores[layer], layer))
        lowest.append(f"{columns[column]}: {', '.join(map(str, order[:4]))}")
        for rank, layer in enumerate(order):
            value = ranking.scores[layer]
            tip = f"{columns[column]}, layer {layer}: {significant(value, 3)}"
            shade = f"h{shades[ranking.ranking.metric](value)}"
            cells[layers.index(layer), column] = MapCell(shade, tip, dotted=4 * rank < len(order))
    return CellMap(
        title, f"The four most redundant layers of each. {'; '.join(lowest)}.",
        list(map(str, layers)), columns, cells, widest=80.0, tallest=14.0, most_across=len(columns),
    )  # fmt: skip


def _files(comparison: ScoreComparison) -> Grid:
    rows = [
        [
            file,
            f"{comparison.models[file].source} ({comparison.models[file].sha256[:12]})",
            f"{text.source} ({text.sha256[:12]})",
            f"{text.samples} x {text.sequence_length}",
        ]
        for file, text in comparison.texts.items()
    ]
    return Grid("Each file", ["file", "model", "text", "samples"], rows, right=(3,))


def _names(comparison: ScoreComparison) -> dict[RankingRef, str]:
    """Each ranking by its metric, its file, or both, whichever tell it from the others."""
    paths = [Path(file) for file in comparison.texts]
    choices = ([p.stem for p in paths], [p.parent.name for p in paths], [*comparison.texts])
    short = next((names for names in choices if len({*names}) == len(paths)), choices[-1])
    files = dict(zip(comparison.texts, short, strict=True))
    rankings = [ranking.ranking for ranking in comparison.scores]
    of_one_metric = len({ranking.metric for ranking in rankings}) == 1
    if of_one_metric:
        return {ranking: files[ranking.file] for ranking in rankings}
    if len(files) == 1:
        return {ranking: ranking.metric for ranking in rankings}
    return {ranking: f"{ranking.metric} ({files[ranking.file]})" for ranking in rankings}


def _figure(value: float | None) -> str:
    return or_dash(value, "{:.3f}".format)
