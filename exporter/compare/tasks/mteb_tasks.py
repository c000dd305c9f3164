"""mteb's tasks by name: ``mteb:STSBenchmark``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.compare.tasks.encoding import TaskEncoder, correlation_influences, reranked
from exporter.compare.tasks.items import TaskScores, failing_as_task
from exporter.errors import TaskError
from exporter.models.ablation.damage import Floats
from exporter.optional import require
from exporter.progress import QUIET, Progress

EXTRA = "mteb"
_REVISION = "local"
_DOCUMENTS = ("document", "passage", "corpus")
Vectors = NDArray[np.float32]
Batches = Iterable[Mapping[str, Any]]
"""As mteb's data loaders give them: in each the texts, by ``text``."""


class MtebModel:
    """What both kinds have."""

    def __init__(self, encoder: TaskEncoder, name: str) -> None:
        self.encoder, self.name = encoder, name

    @property
    def mteb_model_meta(self) -> Any:
        """A name alone: mteb's is to look nothing up."""
        meta = require("mteb.models.model_meta", extra=EXTRA).ModelMeta
        return meta.create_empty({"name": f"depthcut/{self.name}", "revision": _REVISION})


class MtebEncoder(MtebModel):
    """An ``EncoderProtocol``; texts run one at a time."""

    def encode(
        self, inputs: Batches, *, task_metadata: Any, prompt_type: Any = None, **_: Any
    ) -> Vectors:
        """Embeddings as the model's folder makes them, ``[texts, size]``."""
        names = prompt_names(str(task_metadata.name), str(task_metadata.type), prompt_type)
        floats = self.encoder.embed_with(names, _texts(inputs), unit_length=False)
        return floats.astype(np.float32)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Floats:
        """Cosines of all with all, ``[first, second]``."""
        first, second = _unit(embeddings1), _unit(embeddings2)
        cosines: Floats = np.atleast_2d(first) @ np.atleast_2d(second).T
        return cosines

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Floats:
        """Cosines of each with its own, ``[texts]``."""
        cosines: Floats = (_unit(embeddings1) * _unit(embeddings2)).sum(axis=-1)
        return cosines


class MtebCrossEncoder(MtebModel):
    """A ``CrossEncoderProtocol``: a model that reads query and passage together."""

    def predict(self, inputs1: Batches, inputs2: Batches, **_: Any) -> Floats:
        """The logit of the yes of each pair, ``[pairs]``."""
        pairs = zip(_texts(inputs1), _texts(inputs2), strict=True)
        return reranked(self.encoder, list(pairs))


def mteb_model(encoder: TaskEncoder, name: str) -> MtebModel:
    """What mteb is given of a runner."""
    return (MtebCrossEncoder if encoder.classifies else MtebEncoder)(encoder, name)


def prompt_names(task: str, kind: str, prompt_type: Any) -> list[str]:
    """The names under which a folder may have a prompt for a text, the most special first."""
    text = str(getattr(prompt_type, "value", prompt_type)) if prompt_type is not None else ""
    sides = [*(_DOCUMENTS if text in _DOCUMENTS else [text])] if text else []
    special = [*(f"{task}-{side}" for side in sides), task]
    return [*special, *(f"{kind}-{side}" for side in sides), kind, *sides]


def _texts(inputs: Batches) -> list[str]:
    return [str(text) for batch in inputs for text in batch["text"]]


def _unit(embeddings: Any) -> Floats:
    values: Floats = np.asarray(embeddings, np.float64)
    lengths = np.linalg.norm(values, axis=-1, keepdims=True)
    return values / np.where(lengths == 0, 1, lengths)


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
    """A task of mteb, whose data is not loaded yet."""
    library = require("mteb", extra=EXTRA)
    try:
        return library.get_task(name)
    except KeyError as error:
        near = str(error.args[0] if error.args else "").partition("Did you mean")[2]
        text = f" Did you mean{near}" if near else ""
        raise TaskError(
            f"mteb has no task {name!r}.{text}",
            "mteb available-tasks lists them.",
            code="unknown-task",
        ) from None


def run_mteb(
    names: Sequence[str], encoder: TaskEncoder, model_name: str, *, progress: Progress = QUIET
) -> list[TaskScores]:
    """Scores one arm on mteb's tasks; their data comes from the Hugging Face hub."""
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
        outcome = library.evaluate(
            model,
            task,
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs={"batch_size": _ITEMS_AT_ONCE, "show_progress_bar": False},
        )
        [result] = outcome.task_results
    metric = str(task.metadata.main_score)
    whole = [float(row["main_score"]) for rows in result.scores.values() for row in rows]
    items = kept.scores(metric, whole)
    of = "items" if items is not None else "data sets, of which mteb tells no items"
    values = np.array(whole) if items is None else items
    label = f"mteb {mteb_version()}, {name}, {len(values)} {of}"
    return TaskScores(task=f"{PREFIX}{name}", source=label, metrics={_told(metric): values})


def _told(metric: str) -> str:
    """``ndcg@10`` of ``ndcg_at_10``."""
    return metric.replace("_at_", "@")


class _Items:
    """Keeps what a task's figure is made of, as mteb works it out."""

    def __init__(self, task: Any) -> None:
        self._queries: list[dict[str, dict[str, float]]] = []
        self._pairs: list[tuple[Floats, Floats]] = []
        self._watch(task, "task_specific_scores", self._keep_queries)
        self._watch(task, "_calculate_scores", self._keep_pairs)

    def scores(self, metric: str, whole: Sequence[float]) -> Floats | None:
        """Each item's score; None where they aren't known, or don't make the figure."""
        floats = self._of_queries(metric) if self._queries else self._of_pairs(metric)
        if floats is None or len(whole) != 1 or abs(float(floats.mean()) - whole[0]) > _ROUNDING:
            return None
        return floats

    def _of_queries(self, metric: str) -> Floats | None:
        kind, _, depth = metric.partition("_at_")
        key = f"{_PER_QUERY.get(kind)}_{depth}"
        [queries, *more] = self._queries
        if more or not queries or not all(key in query for query in queries.values()):
            return None
        return np.array([queries[name][key] for name in sorted(queries)])

    def _of_pairs(self, metric: str) -> Floats | None:
        if len(self._pairs) != 1 or not metric.endswith("spearman"):
            return None
        return correlation_influences(*self._pairs[0])

    def _keep_queries(self, scores: Any, *_: Any, **__: Any) -> None:
        self._queries.append({str(name): dict(score) for name, score in scores.items()})

    def _keep_pairs(self, scores: Any, right: Any, *_: Any, **__: Any) -> None:
        if isinstance(scores, dict) and scores.get("similarity_scores") is not None:
            result = (scores["similarity_scores"], right)
            self._pairs.append((np.array(result[0], np.float64), np.array(result[1], np.float64)))

    def _watch(self, task: Any, name: str, keep: Any) -> None:
        own = getattr(task, name, None)
        if own is None:
            return

        def instead(*args: Any, **kwargs: Any) -> Any:
            keep(*args, **kwargs)
            return own(*args, **kwargs)

        setattr(task, name, instead)
