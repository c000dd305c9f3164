"""Scores that need no pass at all."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.artifacts import Score
from exporter.score.metric import UNITS, FixedMetric
from exporter.score.subject import Subject


def fixed_scores(subject: Subject, metrics: Sequence[FixedMetric]) -> list[list[Score]]:
    """The scores by each metric, layer by layer."""
    return [
        [
            Score(layer=layer, kind=kind, score=value, std_error=None)
            for layer, values in enumerate(metric.values(len(subject.layers), subject.seed))
            for kind, value in zip(UNITS, values, strict=True)
        ]
        for metric in metrics
    ]
