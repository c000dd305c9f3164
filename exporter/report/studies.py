"""A study's three files: the data, the same as Markdown, and as a page."""

from __future__ import annotations

from pathlib import Path

from exporter.artifacts import Artifact, DepthsReport, StabilityReport
from exporter.errors import UsageError
from exporter.files import write_texts
from exporter.report.markdown import render_study_text

ENDINGS = (".json", ".md", ".html")


def study_files(output: Path) -> tuple[Path, Path, Path]:
    """Where a study's data, Markdown and page stand.

    Args:
        output: The file of the data.

    Raises:
        UsageError: Its ending is that of one of the others.
    """
    if output.suffix in ENDINGS[1:]:
        raise UsageError(
            f"{output} is to hold the study's data; the tables stand beside them as "
            f"{' and '.join(ENDINGS[1:])}.",
            f"Write -o {output.with_suffix('.json')}.",
        )
    return output, output.with_suffix(".md"), output.with_suffix(".html")


def write_stability(report: StabilityReport, output: Path) -> None:
    """Writes the data, then what shows them.

    Raises:
        OSError: One can't be written.
    """
    from exporter.report.html.stability import TITLES, render_stability
    from exporter.report.parts.stability import stability_lead, stability_parts

    text = render_study_text(TITLES[report.over], stability_lead(report), stability_parts(report))
    _write(report, output, text, render_stability(report))


def write_depths(report: DepthsReport, output: Path) -> None:
    """Writes the data, then what shows them.

    Raises:
        OSError: One can't be written.
    """
    from exporter.report.html.depths import TITLE, render_depths
    from exporter.report.parts.depths import depths_lead, depths_parts

    text = render_study_text(TITLE, depths_lead(report), depths_parts(report))
    _write(report, output, text, render_depths(report))


def _write(report: Artifact, output: Path, text: str, page: str) -> None:
    write_texts(dict(zip(study_files(output), (report.to_json(), text, page), strict=True)))
