"""From the names of tasks to one arm's scores: local files, or lm-eval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporter.compare.quality.predictions import LOGITS
from exporter.compare.tasks.encoding import TextCodec
from exporter.compare.tasks.items import TaskFile, read_task
from exporter.compare.tasks.likelihood import BATCH_SIZE, Scorer
from exporter.compare.tasks.multiple_choice import evaluate
from exporter.compare.tasks.scores import TaskScores
from exporter.engines.runners.base import Runner
from exporter.errors import ComparisonError, UsageError
from exporter.models.model_folder import ModelFolder
from exporter.progress import QUIET, Progress

UNLIMITED = 2**20
"""Positions of a model whose config tells no limit."""


@dataclass(frozen=True)
class TaskChoice:
    """What is to be scored.

    Attributes:
        names: Tasks.
        data: A folder of ``NAME.jsonl`` files; None takes lm-eval's tasks, whose items come from
            the Hugging Face hub.
        limit: The first that many items of each; None for all.
    """

    names: tuple[str, ...]
    data: Path | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError("A task needs at least one item.")

    def local(self) -> list[TaskFile] | None:
        """The files' items; None where lm-eval has them.

        Raises:
            TaskError: A task is not there, or a line is broken.
        """
        if self.data is None:
            return None
        return [read_task(self.data, name, limit=self.limit) for name in self.names]


def score_tasks(
    choice: TaskChoice,
    runner: Runner,
    folder: ModelFolder,
    *,
    vocabulary: int | None = None,
    progress: Progress = QUIET,
) -> list[TaskScores]:
    """Scores one arm.

    Args:
        choice: The tasks.
        runner: An entered runner with an output ``logits``.
        folder: Its tokenizer and config.
        vocabulary: Tokens that the model knows; by default as the config says.
        progress: Hears of each task.

    Raises:
        TaskError: A task is not known, its items can't be read, or there is no tokenizer.
        ComparisonError: The model has no logits, or they aren't finite; the tokenizer is another
            model's.
        BackendError: A run fails.
        MissingDependencyError: For lm-eval's tasks, without the extra ``eval``.
    """
    if LOGITS not in {spec.name for spec in runner.outputs}:
        raise ComparisonError(
            f"{folder.onnx} has no output called logits, so it can't choose answers."
        )
    files = choice.local()
    codec = TextCodec(folder)
    scorer = make_scorer(runner, folder, vocabulary=vocabulary)
    if files is None:
        from exporter.compare.tasks.lm_eval_tasks import run_lm_eval

        return run_lm_eval(choice.names, scorer, codec, limit=choice.limit, progress=progress)
    found = []
    for task in files:
        progress.say(f"{task.name}: {len(task.items)} items")
        found.append(evaluate(task, scorer, codec, progress=progress))
    return found


def make_scorer(
    runner: Runner,
    folder: ModelFolder,
    *,
    vocabulary: int | None = None,
    rows: int | None = None,
    longest: int | None = None,
) -> Scorer:
    """A scorer with what the model's config says.

    Args:
        runner: An entered runner.
        folder: The model's config.
        vocabulary: Tokens that it knows; by default as the config says.
        rows: Sequences in one run; None for the default.
        longest: Positions, where the config tells none.
    """
    told = vocabulary or folder.config.get("vocab_size")
    return Scorer(
        runner,
        longest=longest or folder.longest_sequence or UNLIMITED,
        vocabulary=told if isinstance(told, int) else None,
        batch_size=rows or runner.capabilities.batch_size or BATCH_SIZE,
        shares=runner.capabilities.batch_size is None,
    )
