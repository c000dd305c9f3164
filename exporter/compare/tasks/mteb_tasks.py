"""mteb's tasks by name: ``mteb:STSBenchmark``.

Of retrieval and reranking the items are the queries, of STS the pairs, as mteb scores them itself;
of any other task mteb tells figures of whole data sets alone, which are then the items.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from exporter.compare.tasks.encoding import TaskEncoder, correlation_influences
from exporter.compare.tasks.hub import failing_as_task
from exporter.compare.tasks.mteb_model import EXTRA, mteb_model
from exporter.compare.tasks.scores import TaskScores
from exporter.errors import TaskError
from exporter.models.ablation.damage import Floats
from exporter.optional import require
from exporter.progress import QUIET, Progress

PREFIX = "mteb:"
_ITEMS_AT_ONCE = 32
_ROUNDING = 1e-3
"""Of a figure that mteb tells, against the mean of the items that it was made of."""
_PER_QUERY = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}
"""What pytrec_eval calls the figures of each query."""


def mteb_names(tasks: Sequence[str]) -> list[str]:
    """Mteb's tasks among some, without the prefix."""
    return [name.removeprefix(PREFIX) for name in tasks if name.startswith(PREFIX)]


def mteb_version() -> str:
    """Of the installed library; empty without one."""
    try:
        return version("mteb")
    except PackageNotFoundError:
        return ""


def mteb_task(name: str) -> Any:
    """A task of mteb, whose data is not loaded yet.

    Raises:
        TaskError: mteb has none of that name.
        MissingDependencyError: Without the extra ``mteb``.
    """
    library = require("mteb", extra=EXTRA)
    try:
        return library.get_task(name)
    except KeyError as error:
        near = str(error.args[0] if error.args else "").partition("Did you mean")[2]
        told = f" Did you mean{near}" if near else ""
        raise TaskError(
            f"mteb has no task {name!r}.{told}",
            "mteb available-tasks lists them.",
            code="unknown-task",
        ) from None


def run_mteb(
    names: Sequence[str], encoder: TaskEncoder, model_name: str, *, progress: Progress = QUIET
) -> list[TaskScores]:
    """Scores one arm on mteb's tasks; their data comes from the Hugging Face hub.

    Args:
        names: Tasks, without the prefix.
        encoder: Of an entered runner, with the lengths that the model's users cut at.
        model_name: What mteb calls the model.
        progress: Hears of each task.

    Raises:
        TaskError: A task is not known, its data can't be had, or it is not for such a model.
        ComparisonError: The model embeds nothing or is no reranker.
        MissingDependencyError: Without the extra ``mteb``.
    """
    model = mteb_model(encoder, model_name)
    return [_scored(mteb_task(name), name, model, progress) for name in names]


def _scored(task: Any, name: str, model: Any, progress: Progress) -> TaskScores:
    library = require("mteb", extra=EXTRA)
    progress.say(f"mteb {name}: its data comes from the Hugging Face hub")
    kept = _Items(task)
    hint = (
        "Its data comes from the Hugging Face hub: is it reachable? A reranker is for "
        "retrieval and reranking alone. Local files need no mteb: --task-data DIR."
    )
    with failing_as_task("mteb", name, hint):
        found = library.evaluate(
            model,
            task,
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs={"batch_size": _ITEMS_AT_ONCE, "show_progress_bar": False},
        )
        [result] = found.task_results
    metric = str(task.metadata.main_score)
    whole = [float(each["main_score"]) for rows in result.scores.values() for each in rows]
    items = kept.scores(metric, whole)
    of = "items" if items is not None else "data sets, of which mteb tells no items"
    values = np.array(whole) if items is None else items
    label = f"mteb {mteb_version()}, {name}, {len(values)} {of}"
    return TaskScores(task=f"{PREFIX}{name}", source=label, metrics={_told(metric): values})


def _told(metric: str) -> str:
    """``ndcg@10`` of ``ndcg_at_10``."""
    return metric.replace("_at_", "@")


class _Items:
    """Keeps what a task's figure is made of, as mteb works it out.

    Args:
        task: Its methods that see the scores of single items are watched.
    """

    def __init__(self, task: Any) -> None:
        self._queries: list[dict[str, dict[str, float]]] = []
        self._pairs: list[tuple[Floats, Floats]] = []
        self._watch(task, "task_specific_scores", self._keep_queries)
        self._watch(task, "_calculate_scores", self._keep_pairs)

    def scores(self, metric: str, whole: Sequence[float]) -> Floats | None:
        """Each item's score; None where they aren't known, or don't make the figure.

        Args:
            metric: mteb's name of the figure.
            whole: Its values, of each data set.
        """
        found = self._of_queries(metric) if self._queries else self._of_pairs(metric)
        if found is None or len(whole) != 1 or abs(float(found.mean()) - whole[0]) > _ROUNDING:
            return None
        return found

    def _of_queries(self, metric: str) -> Floats | None:
        kind, _, depth = metric.partition("_at_")
        key = f"{_PER_QUERY.get(kind)}_{depth}"
        [queries, *more] = self._queries
        if more or not queries or not all(key in each for each in queries.values()):
            return None
        return np.array([queries[name][key] for name in sorted(queries)])

    def _of_pairs(self, metric: str) -> Floats | None:
        if len(self._pairs) != 1 or not metric.endswith("spearman"):
            return None
        return correlation_influences(*self._pairs[0])

    def _keep_queries(self, scores: Any, *_: Any, **__: Any) -> None:
        self._queries.append({str(name): dict(each) for name, each in scores.items()})

    def _keep_pairs(self, scores: Any, right: Any, *_: Any, **__: Any) -> None:
        if isinstance(scores, dict) and scores.get("similarity_scores") is not None:
            found = (scores["similarity_scores"], right)
            self._pairs.append((np.array(found[0], np.float64), np.array(found[1], np.float64)))

    def _watch(self, task: Any, name: str, keep: Any) -> None:
        own = getattr(task, name, None)
        if own is None:
            return

        def instead(*args: Any, **kwargs: Any) -> Any:
            keep(*args, **kwargs)
            return own(*args, **kwargs)

        setattr(task, name, instead)
