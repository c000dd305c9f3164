"""From the names of tasks to one arm's scores: local files, or lm-eval."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from exporter.artifacts import EvaluationReport, TaskResult, TaskScore
from exporter.compare.agreement import LOGITS
from exporter.compare.arms import Comparison
from exporter.compare.options import TaskOptions
from exporter.compare.tasks.encoding import EncoderTask, TaskEncoder, encoder_task
from exporter.compare.tasks.items import (
    Item,
    TaskItems,
    TaskScores,
    choice_task,
    compare_scores,
    failing_as_task,
    read_task_file,
)
from exporter.compare.tasks.likelihood import ContinuationRequest, LikelihoodScorer, task_texts
from exporter.engines.decoding.generate import open_model
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.runners.base import Runner, tell_notes
from exporter.errors import ComparisonError, TaskError
from exporter.files import sha256_file
from exporter.models.ablation.damage import Floats
from exporter.models.model_folder import ModelFolder
from exporter.optional import require
from exporter.progress import QUIET, Progress


def task_versions(asked: TaskOptions) -> list[str]:
    """What items and scores depend on: their files' hashes, or lm-eval's version."""
    if not asked.tasks:
        return []
    files = local_tasks(asked)
    return [version("lm_eval")] if files is None else [file.sha256 for file in files]


def local_tasks(asked: TaskOptions) -> list[TaskItems | EncoderTask] | None:
    """The files' items; None where lm-eval has them, or nothing is asked for."""
    if asked.task_data is None:
        if asked.tasks:
            require("lm_eval", extra="eval")
        return None
    files = [read_task_file(asked.task_data, name) for name in asked.tasks]
    limit = asked.task_limit
    return [encoder_task(file, limit) or choice_task(file, limit) for file in files]


def only_for_encoders(asked: TaskOptions) -> bool:
    """Whether no task chooses among answers, which takes logits of next tokens."""
    files = local_tasks(asked) if asked.task_data is not None else None
    return files is not None and all(isinstance(file, EncoderTask) for file in files)


def score_tasks(
    asked: TaskOptions,
    runner: Runner,
    folder: ModelFolder,
    *,
    vocabulary: int | None = None,
    progress: Progress = QUIET,
) -> list[TaskScores]:
    """Scores one arm."""
    files = local_tasks(asked)
    if files is None:
        chooser, limit = _chooser(runner, folder, vocabulary), asked.task_limit
        return run_lm_eval(asked.tasks, *chooser, limit=limit, progress=progress)
    scores = []
    for task in files:
        progress.say(f"{task.name}: {len(task.items)} items")
        if isinstance(task, EncoderTask):
            encoder = TaskEncoder(runner, folder, vocabulary=vocabulary, progress=progress)
            scores.append(task.scores(encoder))
        else:
            chooser = _chooser(runner, folder, vocabulary)
            scores.append(evaluate(task, *chooser, progress=progress))
    return scores


def task_results(comparison: Comparison) -> list[TaskResult]:
    """Scores both arms on the same items; nothing where no task was asked for."""
    if not comparison.options.quality.tasks:
        return []
    both = []
    for name in comparison.pair:
        arm = comparison.arms[name]
        folders = (arm.folder, *(comparison.arms[side].folder for side in comparison.pair))
        folder = next((item for item in folders if item.tokenizer), arm.folder)
        both.append(
            score_tasks(
                comparison.options.quality,
                arm.runner,
                folder,
                vocabulary=comparison.vocabulary(),
                progress=comparison.progress,
            )
        )
    return [result for two in zip(*both, strict=True) for result in compare_scores(*two)]


def _chooser(
    runner: Runner, folder: ModelFolder, vocabulary: int | None
) -> tuple[LikelihoodScorer, TextModel]:
    """What a model chooses answers by."""
    if LOGITS not in {spec.name for spec in runner.outputs}:
        raise ComparisonError(
            f"{folder.onnx} has no output called logits, so it can't choose answers.",
            "Leave this task out.",
            code="task-for-another-model",
        )
    text_model = task_texts(folder)
    return LikelihoodScorer.of(runner, folder, vocabulary=vocabulary), text_model


def evaluate(
    task: TaskItems, scorer: LikelihoodScorer, text_model: TextModel, *, progress: Progress = QUIET
) -> TaskScores:
    """Scores one arm on a local task's items; raises as :func:`score_tasks` does."""
    requests = task_requests(task, text_model)
    flat = iter(scorer.score([*itertools.chain(*requests)], progress=progress))
    values = [[next(flat).log_likelihood for _ in request] for request in requests]
    pairs = list(zip(task.items, values, strict=True))
    return TaskScores(
        task=task.name,
        source=f"{task.source}, {len(task.items)} items (SHA-256 {task.sha256[:12]})",
        metrics={
            name: np.array([METRICS[name](*pair) for pair in pairs], np.float64)
            for name in task.metrics
        },
        log_likelihoods=values,
    )


def task_requests(task: TaskItems, text_model: TextModel) -> list[list[ContinuationRequest]]:
    """The choices of each item as tokens."""
    requests = []
    for number, item in enumerate(task.items, 1):
        requests.append([ContinuationRequest.of(text_model, *pair) for pair in item.pairs])
        if not all(request.context and request.continuation for request in requests[-1]):
            raise TaskError(f"{task.name}, item {number}: a choice or its text has no token.")
    return requests


def _right(item: Item, values: Sequence[float]) -> float:
    return float(int(np.argmax(values)) == item.gold)


def _right_by_length(item: Item, values: Sequence[float]) -> float:
    return _right(item, [v / n for v, n in zip(values, item.lengths, strict=True)])


METRICS: dict[str, Callable[[Item, Sequence[float]], float]] = {
    "acc": _right,
    "acc_norm": _right_by_length,
}
"""By name, an item's score, from the log-likelihoods of its choices."""


def run_lm_eval(
    names: Sequence[str],
    scorer: LikelihoodScorer,
    text_model: TextModel,
    *,
    limit: int | None = None,  # the first that many items of each; None for all
    progress: Progress = QUIET,
) -> list[TaskScores]:
    """Scores one arm on lm-eval's tasks; their items come from the Hugging Face hub.

    Groups are scored task by task. Metrics that are no number an item (perplexities, F1 over all)
    are left out and named. Where an item has its log-likelihood for a ``perplexity``, the metric is
    ``log_perplexity``, in nats.
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
    with failing_as_task(", ".join(names), hint):
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
    """Refuses a task that lm-eval doesn't know."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        text = f" Did you mean {' or '.join(near)}?" if near else ""
        raise TaskError(
            f"lm-eval has no task {name!r}.{text}",
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


def evaluate_model(
    model: Path | str,
    tasks: TaskOptions,
    *,
    provider: str = "cpu",
    threads: int | None = None,  # CPU threads; None takes all physical cores
    progress: Progress = QUIET,
) -> EvaluationReport:
    """Scores one model."""
    local_tasks(tasks)  # what can't be read is told before a model is loaded
    folder, runner = open_model(model, provider=provider, threads=threads)
    with runner:
        tell_notes([runner.capabilities], progress)
        scores = score_tasks(tasks, runner, folder, progress=progress)
        return EvaluationReport(
            made_from={"model": sha256_file(folder.onnx)},
            model=str(folder.onnx),
            backend=runner.backend,
            provider=runner.provider,
            threads=runner.threads,
            scores=[score for item in scores for score in _records(item)],
        )


def _records(scores: TaskScores) -> list[TaskScore]:
    return [
        TaskScore(
            task=scores.task,
            metric=metric,
            value=float(values.mean()),
            source=scores.source,
            items=values.tolist(),
            higher_is_better=metric not in scores.lower_is_better,
        )
        for metric, values in scores.metrics.items()
    ]
