"""What a report says, section by section, whatever it is written as.

What was not measured has no section, accuracy apart: that it is missing is worth a sentence. A new
section of the comparison is a function here, and a line in :func:`comparison_document`.
"""

from __future__ import annotations

from exporter.artifacts import ComparisonReport, ImportanceReport
from exporter.report.sections.accuracy import accuracy_sections
from exporter.report.sections.answers import answers_section
from exporter.report.sections.blocks import Document, present
from exporter.report.sections.corners import corners_section
from exporter.report.sections.healing import healing_section
from exporter.report.sections.latency import latency_section
from exporter.report.sections.machine import engines_section, environment_section, reproduce_section
from exporter.report.sections.model import (
    dropped_section,
    forms_section,
    importance_section,
    parity_section,
    size_section,
)
from exporter.report.sections.summary import glance, tiles
from exporter.report.sections.tradeoff import tradeoff_section
from exporter.report.sections.use import use_section
from exporter.report.sections.verdict import (
    headline,
    notices,
    quality_sign,
    speed_sign,
    statements,
    verdict_sentence,
)
from exporter.report.sections.work import work_section


def comparison_document(
    report: ComparisonReport, importance: ImportanceReport | None = None, *, sharing: int = 1
) -> Document:
    """A comparison.

    Args:
        report: The comparison.
        importance: The scores that its plan rests on, for a table and a map; left out without.
        sharing: How many reports share the page.
    """
    accuracy, *answers = accuracy_sections(report)
    sections = [
        corners_section(report),
        latency_section(report, sharing),
        accuracy,
        answers_section(report),
        tradeoff_section(report) if sharing == 1 else None,
        *answers,
        size_section(report),
        work_section(report),
        forms_section(report),
        use_section(report),
        dropped_section(report, importance),
        healing_section(report),
        None if importance is None else importance_section(importance, report.plan),
        engines_section(report),
        parity_section(report),
        environment_section(report),
        reproduce_section(report),
    ]
    return Document(
        command="comparison",
        version=report.versions.get("depthcut", ""),
        title=headline(report),
        subject=importance.model.source if importance else report.arms.baseline.path,
        lead=verdict_sentence(report),
        sections=present(sections),
        statements=statements(report),
        notices=notices(report),
        signs=[speed_sign(report), quality_sign(report)],
        tiles=[*tiles(report)],
        glance=glance(report),
    )
