"""Scores of multiple-choice items by likelihood, as lm-eval defines them.

``acc``: the choice with the highest log-likelihood is the right one. ``acc_norm``: the same after
each log-likelihood is divided by the choice's length in characters.
"""

from __future__ import annotations

import itertools

import numpy as np

from exporter.compare.tasks.encoding import TextCodec
from exporter.compare.tasks.items import Item, TaskFile
from exporter.compare.tasks.likelihood import Request, Scorer
from exporter.compare.tasks.scores import TaskScores
from exporter.errors import TaskError
from exporter.progress import QUIET, Progress


def evaluate(
    task: TaskFile, scorer: Scorer, codec: TextCodec, *, progress: Progress = QUIET
) -> TaskScores:
    """Scores one arm on a task's items.

    Raises:
        TaskError: A choice has no token of its own.
        ComparisonError: Logits aren't finite.
        BackendError: A run fails.
    """
    requests = [_requests(item, number, task, codec) for number, item in enumerate(task.items, 1)]
    flat = iter(scorer.score([*itertools.chain(*requests)], progress=progress))
    values = [[next(flat).log_likelihood for _ in each] for each in requests]
    pairs = list(zip(task.items, values, strict=True))
    metrics = {"acc": [_right(item, sums) for item, sums in pairs]}
    if task.normalised:
        metrics["acc_norm"] = [
            _right(item, [v / n for v, n in zip(sums, item.lengths, strict=True)])
            for item, sums in pairs
        ]
    return TaskScores(
        task=task.name,
        source=f"{task.name}.jsonl, {len(task.items)} items (SHA-256 {task.sha256[:12]})",
        metrics={name: np.array(scores, np.float64) for name, scores in metrics.items()},
        log_likelihoods=values,
    )


def _requests(item: Item, number: int, task: TaskFile, codec: TextCodec) -> list[Request]:
    found = [codec.request(*pair) for pair in item.pairs]
    for request in found:
        if not request.context or not request.continuation:
            raise TaskError(f"{task.name}, item {number}: a choice or its text has no token.")
    return found


def _right(item: Item, values: list[float]) -> bool:
    return int(np.argmax(values)) == item.gold
