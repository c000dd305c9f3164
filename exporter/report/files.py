"""Reports as files: the data, the same as Markdown, and as a page."""

from __future__ import annotations

import base64
import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from exporter.artifacts import (
    ComparisonReport,
    DepthsReport,
    RankedScores,
    RankingRef,
    ScoreComparison,
    SweepReport,
)
from exporter.errors import UsageError
from exporter.files import refuse_overwriting, write_text, write_texts
from exporter.printable import significant, visible
from exporter.report.markdown import markdown
from exporter.report.sections import comparison_document
from exporter.report.sections.blocks import Block, Cell, Document, Grid, Note, Section, Shaded
from exporter.report.sections.depths import depths_document
from exporter.report.sections.sweep import sweep_document
from exporter.report.words import KINDS, or_dash


def scores_document(comparison: ScoreComparison) -> Document:
    """The agreement of the rankings, then the scores of each kind of sublayer."""
    names = _scores_names(comparison)
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
    note = (
        "Correlations are 1 for the same order and -1 for the opposite. Of first n: how many of "
        "the n most redundant are the same. On a page, scores are shaded: the stronger, the larger."
    )
    grid = Grid("How far the rankings agree", header, rows, right=range(3, len(header)))
    return [grid, Note(note)]


def _of_kind(kind: str, rankings: Sequence[RankedScores], names: dict[RankingRef, str]) -> Section:
    """The paper's map, with its numbers: shades are by rank among all scores of a metric."""
    columns = [names[ranking.ranking] for ranking in rankings]
    layers = sorted({layer for ranking in rankings for layer in ranking.scores})
    ordered: dict[str, list[float]] = {}
    for ranking in rankings:
        ordered.setdefault(ranking.ranking.metric, []).extend(ranking.scores.values())
    for scores in ordered.values():
        scores.sort()

    def shaded(ranking: RankedScores, layer: int) -> str:
        if (score := ranking.scores.get(layer)) is None:
            return "-"
        scores = ordered[ranking.ranking.metric]
        return Shaded.of(significant(score, 3), bisect_left(scores, score) / len(scores))

    rows = [[str(layer), *(shaded(ranking, layer) for ranking in rankings)] for layer in layers]
    title = f"Scores of the {KINDS[kind].several}"
    grid = Grid(title, ["layer", *columns], rows, right=range(len(columns) + 1))
    return Section(kind, title, [grid], stays_open=True)


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


def _scores_names(comparison: ScoreComparison) -> dict[RankingRef, str]:
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


_SIGNS = {"good": "▲", "bad": "▼", "even": "=", "unsure": "?", "cut": "×"}
_MARKED = re.compile(r"`([^`]+)`|\*([\w ]+)\*")
_LONG_TABLE = 12


def page(document: Document) -> str:
    """A document as a page."""
    file = resources.files("exporter.report") / "templates" / "style.css"
    style = file.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return visible(
        html_environment()
        .get_template("page.html.j2")
        .render(
            document=document,
            style=Markup(style),  # noqa: S704  # our own file
            style_hash=f"sha256-{digest}",
        )
    )


@cache
def html_environment() -> Environment:
    """Of the templates, with what they call."""
    environment = Environment(
        loader=PackageLoader("exporter.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(inline=_inline, spanned=_spanned, kind=_kind, parted=_parted)
    environment.globals["signs"] = _SIGNS
    return environment


def _parted(section: Section) -> tuple[list[Block], list[Grid]]:
    """What of a section's blocks is open, and what is opened by a click."""
    grids = [block for block in section.blocks if isinstance(block, Grid)]
    long = [g for g in grids if len(g.rows) > _LONG_TABLE and not section.stays_open]
    return [block for block in section.blocks if block not in long], long


def _inline(text: str) -> Markup:
    """A paragraph's text, with what stands between backticks as code, between asterisks leaning."""
    parts, end = [], 0
    for match in _MARKED.finditer(text):
        code, leaning = match.groups()
        tag, words = ("code", code) if code else ("em", leaning)
        parts += [escape(text[end : match.start()]), Markup(f"<{tag}>{{}}</{tag}>").format(words)]  # noqa: S704
        end = match.end()
    return Markup("").join([*parts, escape(text[end:])])


def _spanned(grid: Grid) -> Iterator[tuple[int, Sequence[Cell]]]:
    """Every row with how many rows its first cell spans; 0 where it goes on with the one above."""
    for index, row in enumerate(grid.rows):
        if index and row[0] == "":
            yield 0, row
            continue
        following = (i for i, later in enumerate(grid.rows[index + 1 :], 1) if later[0] != "")
        yield next(following, len(grid.rows) - index), row


def _kind(block: Block | Cell) -> str:
    return type(block).__name__


REPORTS = ("report.json", "report.md", "report.html")
"""What a comparison leaves."""
SWEEP_REPORTS = ("sweep.json", "sweep.md", "sweep.html")
"""What a sweep leaves beside its cells."""


def write_reports(report: ComparisonReport, folder: Path | str) -> list[Path]:
    """Writes report.json, report.md and report.html, all or none, and returns their paths.

    Args:
        report: What :func:`exporter.compare_models` gives.
        folder: Where they go; earlier ones are replaced.
    """
    document = comparison_document(report)
    paths = [Path(folder) / name for name in REPORTS]
    texts = (report.to_json(), markdown(document), page(document))
    write_texts(dict(zip(paths, texts, strict=True)))
    return paths


def study_document(report: ScoreComparison | DepthsReport) -> Document:
    """A study, section by section."""
    if isinstance(report, ScoreComparison):
        return scores_document(report)
    return depths_document(report)


def write_study(report: ScoreComparison | DepthsReport, output: Path) -> None:
    """Writes the data, then what shows them."""
    document = study_document(report)
    texts = (report.to_json(), markdown(document), page(document))
    write_texts(dict(zip(study_files(output), texts, strict=True)))


def write_sweep(report: SweepReport, folder: Path) -> None:
    """Writes :data:`SWEEP_REPORTS`; the data last, which say that the others are there."""
    document = sweep_document(report)
    data, text, shown = (folder / name for name in SWEEP_REPORTS)
    write_texts({shown: page(document), text: markdown(document), data: report.to_json()})


def study_files(output: Path) -> tuple[Path, Path, Path]:
    """Where a study's data, Markdown and page stand."""
    endings = (".md", ".html")
    if output.suffix in endings:
        raise UsageError(
            f"{output} is to hold the study's data; the tables stand beside them as "
            f"{' and '.join(endings)}.",
            f"Write -o {output.with_suffix('.json')}.",
        )
    return output, output.with_suffix(".md"), output.with_suffix(".html")


def render_saved(path: Path, *, output: Path | None = None) -> Path:
    """Renders a saved report again; a file ``.md`` is Markdown."""
    target = output or path.with_suffix(".html")
    refuse_overwriting(target, [path])
    document = comparison_document(ComparisonReport.read(path))
    write_text(target, markdown(document) if target.suffix == ".md" else page(document))
    return target
