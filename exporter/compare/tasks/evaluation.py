"""One model's scores of tasks, from its path to a report."""

from __future__ import annotations

from pathlib import Path

from exporter.artifacts import EvaluationReport, TaskScore
from exporter.compare.options import TaskOptions
from exporter.compare.quality.agreement import predicts_next_token
from exporter.compare.tasks.choosing import local_tasks, score_tasks
from exporter.compare.tasks.probes import make_probes
from exporter.compare.tasks.probing import score_probes, why_unaskable
from exporter.compare.tasks.scores import TaskScores
from exporter.engines.runners.base import Runner, tell_notes
from exporter.engines.runners.registry import open_model
from exporter.errors import TaskError
from exporter.files import sha256_file
from exporter.models.model_folder import ModelFolder
from exporter.progress import QUIET, Progress


def evaluate_model(
    model: Path | str,
    tasks: TaskOptions,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    progress: Progress = QUIET,
) -> EvaluationReport:
    """Scores one model.

    Args:
        model: An ONNX file with its tokenizer beside it, their folder, or an engine; or a backend
            and the path of its model, as in ``llama.cpp:FILE``.
        tasks: The tasks and probes; a model that can't be asked probes is scored on tasks alone.
        provider: Where ONNX Runtime runs the model: ``cpu`` or ``cuda``.
        threads: CPU threads; None takes all physical cores.
        progress: Hears of each task.

    Raises:
        TaskError: A task is not known, its items can't be read, there is no tokenizer, or there
            is nothing to score.
        OnnxFileError: There is no ONNX file, or more than one to choose from.
        ComparisonError: The tokenizer is another model's; logits aren't finite.
        BackendError: The model can't be loaded or run, or has no logits.
        MissingDependencyError: For lm-eval's tasks, without the extra ``eval``.
    """
    local_tasks(tasks)  # what can't be read is told before a model is loaded
    folder, runner = open_model(model, provider=provider, threads=threads)
    with runner:
        tell_notes([runner.capabilities], progress)
        scores = score_tasks(tasks, runner, folder, progress=progress) if tasks.tasks else []
        if tasks.probes:
            scores += _probes(tasks, runner, folder, progress)
        return EvaluationReport(
            made_from={"model": sha256_file(folder.onnx)},
            model=str(folder.onnx),
            backend=runner.backend,
            provider=runner.provider,
            threads=runner.threads,
            scores=[score for found in scores for score in _records(found)],
        )


def _probes(
    tasks: TaskOptions, runner: Runner, folder: ModelFolder, progress: Progress
) -> list[TaskScores]:
    probes = make_probes(tasks.probes)
    causal = predicts_next_token(runner, folder)
    why = why_unaskable(probes, runner, folder, causal=causal)
    if why and not tasks.tasks:
        raise TaskError(f"There is nothing to score: {why}.", code="no-probes")
    if why:
        progress.say(f"probes: left out, {why}")
        return []
    return score_probes(probes, runner, folder, progress=progress)


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
