"""Reports as files: written after a measurement, and again from what was saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from exporter.artifacts import ComparisonReport, ImportanceReport
from exporter.errors import UsageError
from exporter.files import refuse_overwriting, write_text, write_texts

Form = Literal["html", "md"]

REPORTS = ("report.json", "report.md", "report.html")
"""What a comparison leaves."""


def write_reports(
    report: ComparisonReport, folder: Path, importance: ImportanceReport | None = None
) -> list[Path]:
    """Writes :data:`REPORTS`, and returns their paths.

    Raises:
        OSError: One can't be written.
    """
    from exporter.report.html.page import render_html
    from exporter.report.markdown import render

    paths = [folder / name for name in REPORTS]
    texts = [report.to_json(), render(report, importance), render_html(report, importance)]
    write_texts(dict(zip(paths, texts, strict=True)))
    return paths


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
    write_text(target, _text(_names(paths), reports, scores, form))
    return target


def _text(
    names: Sequence[str],
    reports: Sequence[ComparisonReport],
    importance: ImportanceReport | None,
    form: Form,
) -> str:
    if form == "md":
        from exporter.report.markdown import render_all

        return render_all(dict(zip(names, reports, strict=True)), importance)
    from exporter.report.html.page import render_page
    from exporter.report.html.view import Source

    named = zip(names, reports, strict=True)
    return render_page([Source(name, report, importance) for name, report in named])


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names that differ: the folders' where all files are called alike."""
    names = [path.parent.resolve().name if path.stem == "report" else path.stem for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
