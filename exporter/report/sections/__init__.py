"""What a report says, section by section, whatever it is written as."""

from __future__ import annotations

from exporter.artifacts import ComparisonReport
from exporter.report.sections.arms import (
    dropped_section,
    engines_section,
    environment_section,
    forms_section,
    parity_section,
    reproduce_section,
    size_section,
)
from exporter.report.sections.blocks import Document, present
from exporter.report.sections.healing import healing_section
from exporter.report.sections.latency import corners_section, latency_section
from exporter.report.sections.summary import accuracy_sections, answers_section
from exporter.report.sections.verdict import (
    headline,
    notices,
    quality_sign,
    speed_sign,
    verdict_sentence,
)


def comparison_document(report: ComparisonReport) -> Document:
    """A comparison."""
    accuracy, *answers = accuracy_sections(report)
    sections = [
        corners_section(report),
        latency_section(report),
        accuracy,
        answers_section(report),
        *answers,
        size_section(report),
        forms_section(report),
        dropped_section(report),
        healing_section(report),
        engines_section(report),
        parity_section(report),
        environment_section(report),
        reproduce_section(report),
    ]
    return Document(
        command="comparison",
        version=report.versions.get("depthcut", ""),
        title=headline(report),
        subject=report.arms.baseline.path,
        lead=verdict_sentence(report),
        sections=present(sections),
        notices=notices(report),
        signs=[speed_sign(report), quality_sign(report)],
    )
