"""Both arms' scores of the tasks that were asked for."""

from __future__ import annotations

from functools import partial

from pydantic import TypeAdapter

from exporter.artifacts import TaskResult
from exporter.compare.arms import ComparedArm, Pair
from exporter.compare.kept import AccuracyCache
from exporter.compare.quality.agreement import LOGITS
from exporter.compare.tasks.choosing import refuse_missing_tasks, score_tasks
from exporter.compare.tasks.scores import TaskScores, compare_scores
from exporter.errors import ComparisonError


def check_questions(pair: Pair) -> None:
    """Refuses tasks and long contexts that can't be scored, before anything is measured.

    Raises:
        TaskError: A local task is not there, or a line is broken.
        ComparisonError: The models have no logits, or are compiled anew for each length.
        MissingDependencyError: For lm-eval's tasks, without the extra ``eval``.
    """
    quality, runner = pair.options.quality, pair.baseline.runner
    if not (quality.tasks or quality.long_context):
        return
    if LOGITS not in {spec.name for spec in runner.outputs}:
        raise ComparisonError(
            f"{pair.baseline.folder.onnx} has no output called logits, so it can't choose answers.",
            "Leave --tasks and --long-context out.",
            code="no-logits",
        )
    if runner.capabilities.shapes == "compiled":
        raise ComparisonError(
            f"{runner.backend} would compile the model anew for each length of a question.",
            "Ask PyTorch without compilation (torch:DIR); the answers are the same.",
            code="recompiles",
        )
    refuse_missing_tasks(quality)


def task_results(pair: Pair, answers: AccuracyCache) -> list[TaskResult]:
    """Scores both arms on the same items; nothing where no task was asked for.

    Args:
        pair: Running arms.
        answers: Keeps each arm's scores as soon as they are there.

    Raises:
        TaskError: A task is not known, or its items can't be read.
        ComparisonError: Logits aren't finite, or the tokenizer is another model's.
        BackendError: A run fails.
        MissingDependencyError: For lm-eval's tasks, without the extra ``eval``.
    """
    if not pair.options.quality.tasks:
        return []
    both = [
        answers.found(
            f"tasks of the {name}",
            TypeAdapter(list[TaskScores]),
            partial(_scores, pair, arm),
        )
        for name, arm in (("baseline", pair.baseline), ("candidate", pair.candidate))
    ]
    return [result for two in zip(*both, strict=True) for result in compare_scores(*two)]


def _scores(pair: Pair, arm: ComparedArm) -> list[TaskScores]:
    folder = arm.folder if arm.folder.tokenizer else pair.baseline.folder
    return score_tasks(
        pair.options.quality,
        arm.runner,
        folder,
        vocabulary=pair.vocabulary(),
        progress=pair.progress,
    )
