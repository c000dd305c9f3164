"""A sweep's three files: the table as data, as Markdown, and as a page."""

from __future__ import annotations

from pathlib import Path

from exporter.artifacts import SweepReport
from exporter.files import write_texts

SWEEP_REPORTS = ("sweep.json", "sweep.md", "sweep.html")
"""What a sweep leaves beside its cells."""


def write_sweep(report: SweepReport, folder: Path) -> None:
    """Writes them; the data last, which say that the others are there.

    Raises:
        OSError: One can't be written.
    """
    from exporter.report.html.sweep import render_sweep
    from exporter.report.markdown import render_study_text
    from exporter.report.parts.sweep import TITLE, sweep_lead, sweep_parts

    data, text, page = (folder / name for name in SWEEP_REPORTS)
    told = render_study_text(TITLE, sweep_lead(report), sweep_parts(report))
    write_texts({page: render_sweep(report), text: told, data: report.to_json()})
