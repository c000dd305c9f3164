"""lm-eval's tasks by name, scored item by item."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exporter.compare.tasks.hub import failing_as_task
from exporter.compare.tasks.likelihood import LikelihoodScorer
from exporter.compare.tasks.scores import TaskScores
from exporter.engines.decoding.text_model import TextModel
from exporter.errors import TaskError
from exporter.models.ablation.damage import Floats
from exporter.optional import require
from exporter.progress import QUIET, Progress


def run_lm_eval(
    names: Sequence[str],
    scorer: LikelihoodScorer,
    text_model: TextModel,
    *,
    limit: int | None = None,
    progress: Progress = QUIET,
) -> list[TaskScores]:
    """Scores one arm on lm-eval's tasks; their items come from the Hugging Face hub.

    Groups are scored task by task. Metrics that are no number an item (perplexities, F1 over all)
    are left out and named. Where an item has its log-likelihood for a ``perplexity``, the metric is
    ``log_perplexity``, in nats.

    Args:
        names: Tasks or groups.
        scorer: What finds likelihoods.
        text_model: The tokenizer.
        limit: The first that many items of each; None for all.
        progress: Hears of what is left out.

    Raises:
        TaskError: A task is not known, its items can't be had, or no metric is left.
        MissingDependencyError: Without the extra ``eval``.
    """
    evaluator = require("lm_eval.evaluator", extra="eval")
    manager = require("lm_eval.tasks", extra="eval").TaskManager()
    for name in names:
        check_known(name, manager.all_tasks)
    from exporter.compare.tasks.lm_eval_model import RunnerLM

    hint = (
        "Its items come from the Hugging Face hub: is it reachable? Local files need none: "
        "--task-data DIR."
    )
    with failing_as_task("lm-eval", ", ".join(names), hint):
        results = evaluator.simple_evaluate(
            model=RunnerLM(scorer, text_model),
            tasks=list(names),
            limit=limit,
            bootstrap_iters=0,
            task_manager=manager,
        )
    versions, directions = results.get("versions", {}), results.get("higher_is_better", {})
    return [
        _scores(task, versions.get(task), samples, directions.get(task, {}), progress)
        for task, samples in results["samples"].items()
    ]


def check_known(name: str, known: Sequence[str]) -> None:
    """Refuses a task that lm-eval doesn't know.

    Raises:
        TaskError: With the nearest names.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        told = f" Did you mean {' or '.join(near)}?" if near else ""
        raise TaskError(
            f"lm-eval has no task {name!r}.{told}",
            f"It has {len(known)}: lm-eval ls tasks lists them. Local files: --task-data DIR.",
            code="unknown-task",
        )


def _scores(
    task: str,
    version: object,
    samples: list[dict[str, Any]],
    higher_is_better: Mapping[str, bool | None],
    progress: Progress,
) -> TaskScores:
    own = [sample for sample in samples if sample.get("filter") == samples[0].get("filter")]
    ordered = sorted(own, key=lambda sample: int(sample["doc_id"]))
    numbers, lower, left = {}, set(), []
    for metric in ordered[0]["metrics"] if ordered else []:
        values = [sample[metric] for sample in ordered]
        if not all(isinstance(value, (int, float, np.number)) for value in values):
            left.append(metric)
            continue
        name, scores = _named(metric, np.array(values, np.float64))
        numbers[name] = scores
        if higher_is_better.get(metric) is False:
            lower.add(name)
    if left:
        progress.say(f"{task}: left out, since they are not one number per item: {', '.join(left)}")
    if not numbers:
        raise TaskError(f"{task} has no metric with one number per item.")
    label = f"lm-eval, {task} version {version}, {len(ordered)} items"
    return TaskScores(task=task, source=label, metrics=numbers, lower_is_better=frozenset(lower))


def _named(metric: str, values: Floats) -> tuple[str, Floats]:
    """A metric whose mean over the items is its score.

    lm-eval's ``perplexity`` is ``exp(-mean)`` of what an item has, its log-likelihood.
    """
    return ("log_perplexity", -values) if metric == "perplexity" else (metric, values)
