"""The items of tasks that a search keeps the answers to, and those that its plan is judged on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporter.artifacts import TaskResult
from exporter.choose.selection.search_options import SearchOptions
from exporter.compare.tasks.items import Item, TaskItems, TaskScores, compare_scores, read_task
from exporter.compare.tasks.likelihood import ContinuationRequest, saved_folder, task_texts
from exporter.errors import TaskError
from exporter.files import scratch_folder
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.ablation.choices import ChoiceItem, ChoiceItems, ChoiceMeter, ChoiceRow
from exporter.models.ablation.damage import Floats
from exporter.models.ablation.meter import refuse_headless
from exporter.models.texts.calibration import usable_length
from exporter.progress import QUIET, Progress

if TYPE_CHECKING:
    from exporter.engines.decoding.text_model import TextModel
    from exporter.models.loading.model_source import LoadedModel

_LEAST = 2
"""Items of each part: a standard error takes two."""
RIGHT, LOG_PROB = "acc", "choice_log_prob"


@dataclass(frozen=True)
class TaskParts:
    """Items by what they are for; none is in both."""

    steering: tuple[ChoiceItems, ...]
    judged: tuple[ChoiceItems, ...]


def read_tasks(files: Sequence[Path]) -> list[TaskItems]:
    """Reads the files of an objective."""
    items: dict[str, TaskItems] = {}
    for path in files:
        if path.suffix != ".jsonl":
            raise TaskError(
                f"{path} is no .jsonl file.", "Name a file of items.", code="no-task-file"
            )
        task = read_task(path.parent, path.stem)
        if task.sha256 in items:
            raise TaskError(
                f"{path} holds the items of {items[task.sha256].name}, too.",
                "Name each file once.",
                code="task-named-twice",
            )
        items[task.sha256] = task
    return list(items.values())


def part_items(
    tasks: Sequence[TaskItems], options: SearchOptions
) -> list[tuple[tuple[Item, ...], tuple[Item, ...]]]:
    """Of each task the items that steer, and those that judge.

    An item that is there twice, also in two files, counts once.
    """
    fresh = _distinct(tasks)
    for task, items in zip(tasks, fresh, strict=True):
        if len(items) < 2 * _LEAST:
            raise TaskError(
                f"{task.name} has {len(items)} distinct items; the search and the evaluation "
                f"need at least {2 * _LEAST}.",
                "Give a file with more items.",
                code="few-items",
            )
    shortest = min(map(len, fresh))
    steer = max(_LEAST, min(shortest // 2, options.items // len(tasks)))
    judge = max(_LEAST, min(shortest - steer, options.judged_items // len(tasks)))
    results = []
    for items in fresh:
        order = np.random.default_rng(options.seed).permutation(len(items))
        drawn = [items[number] for number in order[: steer + judge]]
        results.append((tuple(drawn[:steer]), tuple(drawn[steer:])))
    return results


def _distinct(tasks: Sequence[TaskItems]) -> list[list[Item]]:
    seen: set[Item] = set()
    items = []
    for task in tasks:
        items.append([item for item in dict.fromkeys(task.items) if item not in seen])
        seen.update(task.items)
    return items


def task_parts(
    loaded: LoadedModel, files: Sequence[Path], tasks: Sequence[TaskItems], options: SearchOptions
) -> TaskParts:
    """The items as the model's tokens."""
    refuse_headless(loaded.model)
    parts = part_items(tasks, options)
    with scratch_folder("tasks") as place:
        texts = task_texts(saved_folder(loaded, place))
        room = usable_length(loaded.model)
        made = [
            [_as_tokens(file, task, items, texts, room) for items in pair]
            for file, task, pair in zip(files, tasks, parts, strict=True)
        ]
    steering, judged = zip(*made, strict=True)
    return TaskParts(steering, judged)


def _as_tokens(
    file: Path, task: TaskItems, items: Sequence[Item], texts: TextModel, room: int | None
) -> ChoiceItems:
    choice_items = [ChoiceItem(tuple(_rows(item, file, texts, room)), item.gold) for item in items]
    choice_items.sort(key=lambda item: -item.longest)  # so that runs have little padding
    return ChoiceItems(str(file), task.sha256, tuple(choice_items))


def _rows(item: Item, file: Path, texts: TextModel, room: int | None) -> Iterator[ChoiceRow]:
    """Longer ones than the model takes lose tokens at their start."""
    for pair in item.pairs:
        context, answer = ContinuationRequest.of(texts, *pair)
        if not context or not answer:
            raise TaskError(f"{file}: a choice or its text has no token.", code="no-token")
        longest = len(context) if room is None else max(1, room + 1 - len(answer))
        yield ChoiceRow(context[-longest:], answer)


def judged_tasks(
    loaded: LoadedModel, parts: TaskParts, cut: BranchReplacements, progress: Progress = QUIET
) -> list[tuple[TaskScores, TaskScores]]:
    """Both models' scores on the items that did not steer, the whole one's first, for each task.

    Those are the share of right answers, and the right one's mean log-probability against the
    others, in nats.
    """
    results = []
    for task in parts.judged:
        meter = ChoiceMeter(loaded.model, task.items)
        whole, other = (
            _scores(task, meter.log_likelihoods(replacements, progress))
            for replacements in ({}, cut)
        )
        results.append((whole, other))
    return results


def _scores(task: ChoiceItems, log_likelihoods: list[list[float]]) -> TaskScores:
    pairs = list(zip(task.items, log_likelihoods, strict=True))
    metrics: dict[str, Floats] = {
        RIGHT: np.array([np.argmax(values) == item.gold for item, values in pairs], np.float64),
        LOG_PROB: np.array([_log_prob(values)[item.gold] for item, values in pairs]),
    }
    source = f"{task.source}, {len(task.items)} items (SHA-256 {task.sha256[:12]})"
    return TaskScores(Path(task.source).stem, source, metrics, log_likelihoods=log_likelihoods)


def _log_prob(values: Sequence[float]) -> Floats:
    """Log-probabilities against each other."""
    wide = np.asarray(values, np.float64)
    floats: Floats = wide - np.logaddexp.reduce(wide)
    return floats


def task_results(pairs: Sequence[tuple[TaskScores, TaskScores]]) -> list[TaskResult]:
    """Each task's scores of both models with paired intervals."""
    return [result for pair in pairs for result in compare_scores(*pair)]


def task_figures(pairs: Sequence[tuple[TaskScores, TaskScores]]) -> dict[str, float]:
    """The same as means over the tasks, with the standard errors of the changes, paired by item."""
    values: dict[str, float] = {}
    for metric, name in ((LOG_PROB, "task_log_prob"), (RIGHT, "task_accuracy")):
        whole, cut = (
            [scores.metrics[metric] for scores in arm] for arm in zip(*pairs, strict=True)
        )
        changes = [after - before for before, after in zip(whole, cut, strict=True)]
        errors = [change.var(ddof=1) / len(change) for change in changes]
        values |= {
            f"{name}_baseline": _mean(whole),
            name: _mean(cut),
            f"{name}_change": _mean(changes),
            f"{name}_change_std_error": math.sqrt(sum(errors)) / len(errors),
        }
    return values


def _mean(tasks: Sequence[Floats]) -> float:
    return float(np.mean([values.mean() for values in tasks]))
