"""The tasks that a comparison asks for, and what their items depend on."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from exporter.compare.options import QualityOptions
from exporter.optional import require

if TYPE_CHECKING:
    from exporter.compare.tasks.choosing import TaskChoice


def asked_tasks(quality: QualityOptions) -> TaskChoice:
    """The tasks by name, and where their items are."""
    from exporter.compare.tasks.choosing import TaskChoice

    return TaskChoice(quality.tasks, quality.task_data, quality.task_limit)


def refuse_missing_tasks(quality: QualityOptions) -> None:
    """Refuses tasks that aren't there.

    Raises:
        TaskError: A local task is not there, or a line is broken.
        MissingDependencyError: For lm-eval's tasks, without the extra ``eval``.
    """
    if quality.tasks and asked_tasks(quality).local() is None:
        require("lm_eval", extra="eval")


def tasks_version(quality: QualityOptions) -> list[str]:
    """What the tasks' items and scores depend on: their files' hashes, or lm-eval's version."""
    if not quality.tasks:
        return []
    files = asked_tasks(quality).local()
    return [version("lm_eval")] if files is None else [file.sha256 for file in files]
