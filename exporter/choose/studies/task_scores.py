"""Scores of tasks with right answers, of the whole model and of cut ones, in PyTorch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from exporter.artifacts import TaskResult
from exporter.artifacts.store import Store
from exporter.compare.options import TaskOptions
from exporter.compare.tasks.choosing import local_tasks, score_tasks
from exporter.compare.tasks.opening import saved_folder
from exporter.compare.tasks.scores import compare_scores
from exporter.files import scratch_folder
from exporter.models.ablation.branch_replacements import BranchReplacements, branches_replaced
from exporter.models.loading.model_source import LoadedModel
from exporter.printable import counted
from exporter.progress import QUIET, Progress

_P = TypeVar("_P", bound=Hashable)
_RESULTS = TypeAdapter(list[TaskResult])


def compared_tasks(
    loaded: LoadedModel,
    asked: TaskOptions,
    cuts: Mapping[_P, BranchReplacements],
    *,
    kept: Path | None = None,
    progress: Progress = QUIET,
) -> dict[_P, list[TaskResult]]:
    """Each cut model's scores beside the whole one's, on the same items.

    The branches that are cut still run and fill their caches; only what they add is nothing. Cuts
    that are the same are scored once.

    Args:
        loaded: The model, with its tokenizer.
        asked: The tasks; of none nothing is scored.
        cuts: By whatever the caller calls them.
        kept: The file where results are kept for a later call; None keeps nothing.
        progress: Told which cut is at work.

    Raises:
        TaskError: A task is not known or can't be read, or there is no tokenizer.
        ExportError: The model keeps no plain cache of keys and values.
        MissingDependencyError: For lm-eval's tasks, without the extra ``eval``.
        UsageError: That file is something else.
    """
    if not asked.tasks:
        return {}
    store = Store(kept, _about(loaded, asked))
    missing = {_name(cut): cut for cut in cuts.values() if not _known(store, cut)}
    if missing:
        _score(loaded, asked, list(missing.values()), store, progress)
    return {name: _known(store, cut) for name, cut in cuts.items()}


def _name(cut: BranchReplacements) -> str:
    return ", ".join(f"{kind} {layer}" for layer, kind in sorted(cut))


def _known(store: Store, cut: BranchReplacements) -> list[TaskResult]:
    try:
        return _RESULTS.validate_python(store.find(_name(cut)))
    except ValidationError:
        return []


def _about(loaded: LoadedModel, asked: TaskOptions) -> dict[str, object]:
    files = local_tasks(asked)
    told = asked.tasks if files is None else [(task.name, task.sha256) for task in files]
    return {**loaded.identity(), "of": list(map(list, told)), "limit": asked.task_limit}


def _score(
    loaded: LoadedModel,
    asked: TaskOptions,
    cuts: Sequence[BranchReplacements],
    store: Store,
    progress: Progress,
) -> None:
    import torch

    from exporter.engines.runners.pytorch import TorchRunner

    runner = TorchRunner(loaded.model, compiled=False, threads=torch.get_num_threads())
    with scratch_folder("tasks") as place, runner:
        folder = saved_folder(loaded, place)
        progress.say("tasks: the whole model")
        whole = score_tasks(asked, runner, folder, progress=progress)
        for number, cut in enumerate(cuts, start=1):
            progress.say(
                f"tasks: without {counted(len(cut), 'sublayer')} ({number} of {len(cuts)})"
            )
            with branches_replaced(loaded.model, cut):
                scores = score_tasks(asked, runner, folder, progress=progress)
            pairs = zip(whole, scores, strict=True)
            found = [result for pair in pairs for result in compare_scores(*pair)]
            store.keep(_name(cut), _RESULTS.dump_python(found, mode="json"))
