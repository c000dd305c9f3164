"""One model's scores of tasks, from its path to a report."""

from __future__ import annotations

from pathlib import Path

from exporter.artifacts import EvaluationReport, TaskScore
from exporter.compare.options import TaskOptions
from exporter.compare.tasks.choosing import local_tasks, score_tasks
from exporter.compare.tasks.scores import TaskScores
from exporter.compare.threads import choose_threads
from exporter.engines.runners.registry import open_model
from exporter.engines.runners.widening import tell_widened
from exporter.files import sha256_file
from exporter.progress import QUIET, Progress


def evaluate_model(
    path: Path,
    tasks: TaskOptions,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    progress: Progress = QUIET,
) -> EvaluationReport:
    """Scores one model.

    Args:
        path: An ONNX file with its tokenizer beside it, their folder, or an engine.
        tasks: The tasks.
        provider: Where ONNX Runtime runs the model: ``cpu`` or ``cuda``.
        threads: CPU threads; None finds what makes a step fastest, in a short probe.
        progress: Hears of each task.

    Raises:
        TaskError: A task is not known, its items can't be read, or there is no tokenizer.
        OnnxFileError: There is no ONNX file, or more than one to choose from.
        ComparisonError: The tokenizer is another model's; logits aren't finite.
        BackendError: The model can't be loaded or run, or has no logits.
        MissingDependencyError: For lm-eval's tasks, without the extra ``eval``.
    """
    local_tasks(tasks)  # what can't be read is told before a model is loaded
    folder, runner = open_model(path, provider=provider, threads=threads)
    probe = None
    if threads is None:
        probe = choose_threads(runner, longest=folder.longest_sequence, progress=progress)
    with runner:
        tell_widened([runner.capabilities], progress)
        scores = score_tasks(tasks, runner, folder, progress=progress)
        return EvaluationReport(
            made_from={"model": sha256_file(folder.onnx)},
            model=str(folder.onnx),
            backend=runner.backend,
            provider=runner.provider,
            threads=runner.threads,
            thread_probe=probe,
            scores=[score for found in scores for score in _records(found)],
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
