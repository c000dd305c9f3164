"""What a report says, part by part, whatever it is written as.

What was not measured has no part here, accuracy apart: that it is missing is worth a sentence. A
new part of the comparison is a function here, and a line in :func:`comparison_document`.
"""

from __future__ import annotations

from exporter.artifacts import ComparisonReport, ImportanceReport
from exporter.report.parts.accuracy import accuracy_parts
from exporter.report.parts.corners import corners_part
from exporter.report.parts.healing import healing_part
from exporter.report.parts.latency import latency_part
from exporter.report.parts.machine import engines_part, environment_part, reproduce_part
from exporter.report.parts.model import (
    dropped_part,
    forms_part,
    importance_part,
    parity_part,
    size_part,
)
from exporter.report.parts.part import Document, present
from exporter.report.parts.summary import glance, tiles
from exporter.report.parts.tradeoff import overview_part, tradeoff_part
from exporter.report.parts.verdict import (
    headline,
    notices,
    quality_sign,
    speed_sign,
    statements,
    verdict_sentence,
)

__all__ = ["comparison_document", "overview_part"]


def comparison_document(
    report: ComparisonReport, importance: ImportanceReport | None = None, *, sharing: int = 1
) -> Document:
    """A comparison.

    Args:
        report: The comparison.
        importance: The scores that its plan rests on, for a table and a map; left out without.
        sharing: How many reports share the page.
    """
    accuracy, *answers = accuracy_parts(report)
    parts = [
        corners_part(report),
        latency_part(report, sharing),
        accuracy,
        tradeoff_part(report) if sharing == 1 else None,
        *answers,
        size_part(report),
        forms_part(report),
        dropped_part(report, importance),
        healing_part(report),
        None if importance is None else importance_part(importance, report.plan),
        engines_part(report),
        parity_part(report),
        environment_part(report),
        reproduce_part(report),
    ]
    return Document(
        command="comparison",
        version=report.versions.get("depthcut", ""),
        title=headline(report),
        subject=importance.model.source if importance else report.arms.baseline.path,
        lead=verdict_sentence(report),
        parts=present(parts),
        statements=statements(report),
        notices=notices(report),
        signs=[speed_sign(report), quality_sign(report)],
        tiles=[*tiles(report)],
        glance=glance(report),
    )
