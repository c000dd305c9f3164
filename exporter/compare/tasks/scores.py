"""A task's scores, item by item, and how those of two arms differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from pydantic import PlainSerializer, PlainValidator

from exporter.artifacts import TaskResult
from exporter.compare.quality.intervals import difference_interval, mcnemar_p
from exporter.errors import ComparisonError
from exporter.models.ablation.damage import Floats

_Kept = Annotated[
    Floats,
    PlainValidator(lambda values: np.array(values, np.float64)),
    PlainSerializer(lambda values: values.tolist()),
]
"""An array that goes to JSON and back."""


@dataclass(frozen=True)
class TaskScores:
    """One arm's scores of one task.

    Attributes:
        task: Its name.
        source: Where the items came from.
        metrics: By name, the score of each item.
        lower_is_better: The metrics of which less is better.
        log_likelihoods: Where the task has choices, those of each item's.
    """

    task: str
    source: str
    metrics: Mapping[str, _Kept]
    lower_is_better: frozenset[str] = frozenset()
    log_likelihoods: Sequence[Sequence[float]] = field(default=())


def compare_scores(baseline: TaskScores, candidate: TaskScores) -> list[TaskResult]:
    """Both arms' scores of the same items, a result for each metric.

    Raises:
        ComparisonError: The arms have other metrics or items.
    """
    if {name: len(values) for name, values in baseline.metrics.items()} != {
        name: len(values) for name, values in candidate.metrics.items()
    }:
        raise ComparisonError(f"The arms have scores of other items of {baseline.task}.")
    return [_result(baseline, candidate, metric) for metric in baseline.metrics]


def _result(baseline: TaskScores, candidate: TaskScores, metric: str) -> TaskResult:
    pair = baseline.metrics[metric], candidate.metrics[metric]
    higher = metric not in baseline.lower_is_better
    result = TaskResult(
        task=baseline.task,
        metric=metric,
        items=len(pair[0]),
        baseline=float(pair[0].mean()),
        candidate=float(pair[1].mean()),
        difference=difference_interval(*pair),
        source=baseline.source,
        higher_is_better=higher,
    )
    if not np.isin(pair, (0, 1)).all():
        return result
    lost, won = int((pair[0] > pair[1]).sum()), int((pair[0] < pair[1]).sum())
    if not higher:
        lost, won = won, lost
    return result.model_copy(
        update={
            "only_baseline_right": lost,
            "only_candidate_right": won,
            "mcnemar_p": mcnemar_p(lost, won),
        }
    )
