"""Reports as files: the data, the same as Markdown, and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from exporter.artifacts import (
    ComparisonReport,
    DepthsReport,
    ImportanceReport,
    ParetoCurve,
    ScoreComparison,
    SweepReport,
)
from exporter.errors import UsageError
from exporter.files import refuse_overwriting, write_text, write_texts
from exporter.report.html import page
from exporter.report.markdown import markdown, several_markdown
from exporter.report.sections import comparison_document
from exporter.report.sections.blocks import Document
from exporter.report.sections.depths import depths_document
from exporter.report.sections.front import front_document
from exporter.report.sections.scores import scores_document
from exporter.report.sections.sweep import sweep_document
from exporter.report.sections.tradeoff import letter, overview_section

Form = Literal["html", "md"]

REPORTS = ("report.json", "report.md", "report.html")
"""What a comparison leaves."""
SWEEP_REPORTS = ("sweep.json", "sweep.md", "sweep.html")
"""What a sweep leaves beside its cells."""


def write_reports(
    report: ComparisonReport, folder: Path, importance: ImportanceReport | None = None
) -> list[Path]:
    """Writes :data:`REPORTS`, and returns their paths.

    Raises:
        OSError: One can't be written.
    """
    document = comparison_document(report, importance)
    paths = [folder / name for name in REPORTS]
    texts = (report.to_json(), markdown(document), page([document]))
    write_texts(dict(zip(paths, texts, strict=True)))
    return paths


def study_document(report: ScoreComparison | DepthsReport) -> Document:
    """A study, section by section."""
    if isinstance(report, ScoreComparison):
        return scores_document(report)
    return depths_document(report)


def write_study(report: ScoreComparison | DepthsReport, output: Path) -> None:
    """Writes the data, then what shows them.

    Raises:
        OSError: One can't be written.
    """
    document = study_document(report)
    texts = (report.to_json(), markdown(document), page([document]))
    write_texts(dict(zip(study_files(output), texts, strict=True)))


def write_sweep(report: SweepReport, folder: Path) -> None:
    """Writes :data:`SWEEP_REPORTS`; the data last, which say that the others are there.

    Raises:
        OSError: One can't be written.
    """
    document = sweep_document(report)
    data, text, shown = (folder / name for name in SWEEP_REPORTS)
    write_texts({shown: page([document]), text: markdown(document), data: report.to_json()})


def write_front(curve: ParetoCurve, path: Path) -> Path:
    """Writes a front's data, and its page beside it, whose path is returned.

    Raises:
        OSError: One can't be written.
    """
    shown = path.with_suffix(".html")
    write_texts({shown: page([front_document(curve)]), path: curve.to_json()})
    return shown


def study_files(output: Path) -> tuple[Path, Path, Path]:
    """Where a study's data, Markdown and page stand.

    Args:
        output: The file of the data.

    Raises:
        UsageError: Its ending is that of one of the others.
    """
    endings = (".md", ".html")
    if output.suffix in endings:
        raise UsageError(
            f"{output} is to hold the study's data; the tables stand beside them as "
            f"{' and '.join(endings)}.",
            f"Write -o {output.with_suffix('.json')}.",
        )
    return output, output.with_suffix(".md"), output.with_suffix(".html")


def render_saved(
    paths: Sequence[Path],
    *,
    importance: Path | None = None,
    output: Path | None = None,
    form: Form = "html",
) -> Path:
    """Renders saved reports again, several of them together.

    Args:
        paths: The report.json files, at least one.
        importance: The importance.json that their plans rest on.
        output: The file; by default that of one report beside it, with another ending.
        form: ``html`` or ``md``.

    Raises:
        ArtifactError: A file is missing or not valid.
        UsageError: Several reports without an output, or an output that is an input.
    """
    if output is None and len(paths) > 1:
        raise UsageError("Several reports make one page, and it has no name.", "Give it by -o.")
    target = output or paths[0].with_suffix(f".{form}")
    refuse_overwriting(target, [*paths, *([importance] if importance else [])])
    reports = [ComparisonReport.read(path) for path in paths]
    scores = ImportanceReport.read(importance) if importance else None
    write_text(target, rendered(dict(zip(_names(paths), reports, strict=True)), scores, form))
    return target


def rendered(
    reports: Mapping[str, ComparisonReport],
    importance: ImportanceReport | None = None,
    form: Form = "html",
) -> str:
    """Reports by name as one page or Markdown text; several share a plot and a table.

    Args:
        reports: At least one.
        importance: The scores that their plans rest on, for tables and maps; left out without.
        form: ``html`` or ``md``.
    """
    sharing = len(reports)
    documents = [comparison_document(r, importance, sharing=sharing) for r in reports.values()]
    if sharing == 1:
        return page(documents) if form == "html" else markdown(documents[0])
    if form == "md":
        return several_markdown(documents, overview_section(reports))
    names = [f"{letter(index)}: {name}" for index, name in enumerate(reports)]
    return page(documents, names, overview_section(reports))


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names that differ: the folders' where all files are called alike."""
    names = [path.parent.resolve().name if path.stem == "report" else path.stem for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
