"""evaluation.json: one model's scores of tasks, item by item."""

from __future__ import annotations

from typing import Literal

from exporter.artifacts.base import Artifact, Record
from exporter.artifacts.latency import ThreadProbe


class TaskScore(Record):
    """One metric of one task: its mean, and the score of each item in the task's order."""

    task: str
    metric: str
    value: float
    source: str
    items: list[float]
    higher_is_better: bool = True


class EvaluationReport(Artifact):
    """evaluation.json. ``model`` is the path of what ran, ``backend`` and ``provider`` where."""

    kind: Literal["evaluation_report"] = "evaluation_report"
    model: str
    backend: str
    provider: str
    threads: int | None = None
    thread_probe: ThreadProbe | None = None
    scores: list[TaskScore]
