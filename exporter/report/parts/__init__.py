"""What a report says, part by part, whatever it is written as.

What was not measured has no part here, accuracy apart: that it is missing is worth a sentence.
"""

from __future__ import annotations

from exporter.artifacts import ComparisonReport, ImportanceReport
from exporter.report.parts.accuracy import accuracy_part, positions_part
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
from exporter.report.parts.part import Part
from exporter.report.parts.tasks import (
    embeddings_part,
    generation_part,
    long_context_part,
    tasks_part,
)

__all__ = ["all_parts"]


def all_parts(report: ComparisonReport, importance: ImportanceReport | None = None) -> list[Part]:
    """All parts that the report has, in the order in which they are read."""
    parts = [
        corners_part(report),
        latency_part(report),
        accuracy_part(report),
        positions_part(report),
        tasks_part(report),
        generation_part(report),
        long_context_part(report),
        embeddings_part(report),
        size_part(report),
        forms_part(report),
        dropped_part(report),
        healing_part(report),
        None if importance is None else importance_part(importance, report.plan),
        engines_part(report),
        parity_part(report),
        environment_part(report),
        reproduce_part(report),
    ]
    return [part for part in parts if part is not None]
