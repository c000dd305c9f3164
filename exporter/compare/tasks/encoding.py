"""Tasks for encoders: their local items, and one arm's scores of them.

Retrieval by cosine has ``ndcg@10`` (Järvelin and Kekäläinen, 2002) and ``recall@10``; ranking, by a
reranker's logit or by cosine, ``ndcg@10`` and ``mrr@10``; pairs ``spearman``, the rank correlation
of their similarities with people's scores; classes ``acc`` and ``f1``, averaged over the classes.
The mean over items is the figure, also of those that are no means: an item then has the figure plus
its influence on it, whose spread is that of the figure (the delta method).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import stats

from exporter.compare.agreement import (
    LOGITS,
    check_tokens,
    class_rows,
    embed,
    embedding_output,
    unit_length,
)
from exporter.compare.tasks.items import FORMAT_HINT, TaskFile, TaskScores, Text, Texts, broken
from exporter.engines.runners.base import Runner
from exporter.errors import ComparisonError, TaskError
from exporter.models.ablation.damage import Floats
from exporter.models.model_folder import ModelFolder
from exporter.models.residual_stream import classes_of_texts
from exporter.models.sentence_folder import pooling_of, read_prompts
from exporter.models.texts.passages import LONGEST_PAIR, LONGEST_PASSAGE, cut_to
from exporter.models.texts.tokenizer import tokenizer_in
from exporter.progress import QUIET, Progress
from graph_passes.types import number_in

_BEST = 10
_NO_AND_YES = 2  # classes of a reranker, also of one with a single logit
_QUERY, _PASSAGE = ("query",), ("document", "passage", "corpus")
"""The names of the prompts that stand before each kind of text, the first that a folder has."""


class TaskEncoder:
    """Embeds and classifies texts."""

    def __init__(
        self,
        runner: Runner,
        folder: ModelFolder,
        *,
        vocabulary: int | None = None,  # tokens that the model knows; None: that isn't known
        progress: Progress = QUIET,
    ) -> None:
        if folder.tokenizer is None:
            raise TaskError(
                f"There is no tokenizer.json next to {folder.onnx}, and tasks need one.",
                "Copy the model's tokenizer there.",
                code="no-tokenizer",
            )
        self._runner, self._folder, self._progress = runner, folder, progress
        self._vocabulary, self._tokenizer = vocabulary, tokenizer_in(folder.tokenizer)
        self._pooling, self._prompts = pooling_of(folder.home), read_prompts(folder.home)

    def embed(self, texts: Sequence[str], prompts: Sequence[str] = ()) -> Floats:
        """Embeddings of length 1, ``[texts, size]``, behind the first prompt that there is."""
        if embedding_output(self._runner.outputs) is None:
            raise ComparisonError(
                f"{self._folder.onnx} gives no embeddings, so it can't compare texts.",
                "Leave this task out, or name a sentence encoder.",
                code="task-for-another-model",
            )
        prompt, vectors = self._prompts.of(*prompts), list[Floats]()
        with self._progress.task("embeddings", total=len(texts), unit="texts") as task:
            for number, text in enumerate(texts):
                ids, _ = self._encoded(prompt + text)
                what = f"The embedding of text {number}"
                vectors.append(embed(self._runner, ids, what, pooling=self._pooling))
                task.advance()
        return unit_length(np.stack(vectors))

    def log_probabilities(self, texts: Sequence[tuple[str, ...]]) -> Floats:
        """Of the classes of each text or pair, ``[texts, classes]``."""
        if not self.classifies:
            raise ComparisonError(
                f"{self._folder.onnx} doesn't give each text one class.",
                "Leave this task out, or name a classifier of texts.",
                code="task-for-another-model",
            )
        rows = []
        with self._progress.task("classes", total=len(texts), unit="texts") as task:
            for number, parts in enumerate(texts):
                ids, types = self._encoded(*parts)
                what = f"The model's logits of text {number}"
                rows.append(class_rows(self._runner, ids, what, types=types))
                task.advance()
        return np.concatenate(rows)

    def _encoded(self, *texts: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens of a text or a pair, and of which text each is."""
        longest = LONGEST_PASSAGE if len(texts) == 1 else LONGEST_PAIR
        longest = min(longest, self._folder.longest_sequence or longest)
        types: Sequence[int] | None = None
        if len(texts) == 1:
            tokens = cut_to(self._tokenizer, texts[0], longest)
        else:
            tokens, types = self._tokenizer.pair(texts[0], texts[1], longest)
        ids = np.array(tokens, np.int64)
        if self._vocabulary is not None:
            check_tokens(int(ids.max(initial=0)), self._vocabulary)
        return ids, np.array(types or [0] * len(ids), np.int64)

    @property
    def classifies(self) -> bool:
        """Whether the model gives each text one class."""
        outputs = {spec.name: spec.shape for spec in self._runner.outputs}
        return classes_of_texts(outputs.get(LOGITS)) is not None

    @property
    def labels(self) -> Mapping[str, int]:
        """The classes' numbers by name, as the config has them; a single one's is the yes, 1."""
        numbers = dict(labels_in(self._folder.config))
        return dict.fromkeys(numbers, 1) if len(numbers) == 1 else numbers


def labels_in(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The names of the classes, each with its number; none where the config tells none."""
    value = config.get("id2label")
    entries = value.items() if isinstance(value, dict) else ()
    numbered = ((str(name), number_in(str(number))) for number, name in entries)
    return [(name, number) for name, number in numbered if number is not None]


class Query(NamedTuple):
    """A text, its own passages unless there is a corpus, and the places of those that answer it."""

    text: str
    relevant: frozenset[int]
    passages: Sequence[str] = ()


class Judged(NamedTuple):
    """A text or a pair, and what people say of it: a score, or a class by name or number."""

    texts: tuple[str, ...]
    right: Any


@dataclass(frozen=True)
class EncoderTask:
    """A task for encoders."""

    name: str
    source: str
    sha256: str
    items: Sequence[Any]
    metrics: Callable[[EncoderTask, TaskEncoder], dict[str, Floats]]
    corpus: Sequence[str] = ()

    def scores(self, encoder: TaskEncoder) -> TaskScores:
        """One arm's scores."""
        text = f"{self.source}, {len(self.items)} items (SHA-256 {self.sha256[:12]})"
        return TaskScores(self.name, text, self.metrics(self, encoder))


def _retrieved(task: EncoderTask, encoder: TaskEncoder) -> dict[str, Floats]:
    corpus = encoder.embed(task.corpus, _PASSAGE)
    queries = encoder.embed([query.text for query in task.items], _QUERY)
    cosines = zip(task.items, queries @ corpus.T, strict=True)
    hits = [best_hits(row, query.relevant) for query, row in cosines]
    shares = [hit.sum() / len(q.relevant) for hit, q in zip(hits, task.items, strict=True)]
    gains = discounted_gains(task.items, hits)
    return {f"ndcg@{_BEST}": gains, f"recall@{_BEST}": np.array(shares)}


def _ranked(task: EncoderTask, encoder: TaskEncoder) -> dict[str, Floats]:
    pairs = zip(task.items, _relevances(task.items, encoder), strict=True)
    hits = [best_hits(scores, query.relevant) for query, scores in pairs]
    first = [1 / (hit.argmax() + 1) if hit.any() else 0.0 for hit in hits]
    gains = discounted_gains(task.items, hits)
    return {f"ndcg@{_BEST}": gains, f"mrr@{_BEST}": np.array(first)}


def _relevances(queries: Sequence[Query], encoder: TaskEncoder) -> list[Floats]:
    """Of each query's passages, ``[passages]``: the yes of a reranker, else the cosine."""
    ends = np.cumsum([len(query.passages) for query in queries])[:-1]
    pairs = [(query.text, passage) for query in queries for passage in query.passages]
    if encoder.classifies:
        return np.split(reranked(encoder, pairs), ends)
    asking = encoder.embed([query.text for query in queries], _QUERY)
    parts = np.split(encoder.embed([passage for _, passage in pairs], _PASSAGE), ends)
    return [passages @ query for passages, query in zip(parts, asking, strict=True)]


def reranked(encoder: TaskEncoder, pairs: Sequence[tuple[str, str]]) -> Floats:
    """A reranker's logit of the yes against the no, ``[pairs]``."""
    likely = encoder.log_probabilities(pairs)
    if likely.shape[1] != _NO_AND_YES:
        raise ComparisonError(
            f"The model has {likely.shape[1]} classes, of which none is known to be the yes.",
            "Rank with a reranker: one logit, or two of which the second is the yes.",
            code="task-for-another-model",
        )
    # The log-probability of a sure yes is 0 within rounding, and many were alike.
    yes: Floats = likely[:, 1] - likely[:, 0]
    return yes


def best_hits(scores: Floats, relevant: frozenset[int]) -> NDArray[np.bool_]:
    """Of the ten highest scores, best first, whether they are of relevant passages."""
    best = np.argsort(-scores, kind="stable")[:_BEST]
    return np.isin(best, list(relevant))


def discounted_gains(queries: Sequence[Query], hits: Sequence[NDArray[np.bool_]]) -> Floats:
    """The discounted gain of each query, as a share of the best that there is."""
    gain = 1 / np.log2(np.arange(2, _BEST + 2))
    best = np.array([gain[: len(query.relevant)].sum() for query in queries])
    floats: Floats = np.array([gain[: len(hit)][hit].sum() for hit in hits]) / best
    return floats


def _alike(task: EncoderTask, encoder: TaskEncoder) -> dict[str, Floats]:
    people = np.array([pair.right for pair in task.items])
    if encoder.classifies:
        floats = reranked(encoder, [pair.texts for pair in task.items])
    else:
        first, second = (encoder.embed([pair.texts[at] for pair in task.items]) for at in (0, 1))
        floats = (first * second).sum(axis=1)
    return {"spearman": correlation_influences(floats, people)}


def correlation_influences(first: Floats, second: Floats) -> Floats:
    """Spearman's correlation plus each item's influence on it; the mean is the correlation.

    first: `[items]`; all the same have no order, so that the correlation is 0.
    second: `[items]`, likewise.
    """
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return np.zeros(len(first))
    one, other = (stats.zscore(stats.rankdata(values)) for values in (first, second))
    whole = (one * other).mean()
    floats: Floats = whole + one * other - whole * (one**2 + other**2) / 2
    return floats


def _classified(task: EncoderTask, encoder: TaskEncoder) -> dict[str, Floats]:
    likely = encoder.log_probabilities([item.texts for item in task.items])
    classes = likely.shape[1]
    right = np.array([_number(task.name, item.right, encoder, classes) for item in task.items])
    said = likely.argmax(axis=1)
    return {"acc": (said == right).astype(np.float64), "f1": f1_influences(said, right)}


def _number(name: str, label: str | int, encoder: TaskEncoder, classes: int) -> int:
    """A label's class."""
    labels = encoder.labels
    number = labels.get(label, -1) if isinstance(label, str) else label
    named = {1: _NO_AND_YES}.get(len(labels), len(labels))  # a single logit makes two classes
    if not 0 <= number < classes or (labels and named != classes):
        raise ComparisonError(
            f"{name} has the label {label!r}; the model has {classes} classes, and its config "
            f"calls them {', '.join(labels) or 'nothing'}.",
            "Write the labels as id2label in config.json has them, or their numbers.",
            code="labels-mismatch",
        )
    return number


def f1_influences(said: NDArray[np.int64], right: NDArray[np.int64]) -> Floats:
    """Macro-averaged F1 plus each item's influence on it; the mean is the F1.

    said: `[items]`, the classes that the model gives.
    right: `[items]`, the right ones; each that either has counts.
    """
    result = []
    for item in np.union1d(said, right):
        hits = 2.0 * ((said == item) & (right == item))
        either = (said == item).astype(np.float64) + (right == item)
        score = hits.sum() / either.sum()
        result.append(score + (hits - score * either) / either.mean())
    mean: Floats = np.mean(result, axis=0)
    return mean


_RETRIEVAL = 'Each line is {"id": NAME, "text": TEXT} or {"query": TEXT, "relevant": [NAME, ...]}.'
_RANKING = 'Each line is {"query": TEXT, "passages": [TEXT, ...], "relevant": [PLACE, ...]}.'
_PAIRS = 'Each line is {"sentence1": TEXT, "sentence2": TEXT, "score": NUMBER}.'
_LABELS = 'Each line is {"text": TEXT, "label": NAME or NUMBER}, or has a pair of sentences.'
_Some = Field(min_length=1)
_ASKED = {"query": Text, "relevant": Annotated[list[Text], _Some]}
_RANKED = {"query": Text, "passages": Texts, "relevant": Annotated[list[int], _Some]}
_PAIR = {"sentence1": Text, "sentence2": Text}
_SCORED = {**_PAIR, "score": Annotated[float, Field(allow_inf_nan=False)]}


def encoder_task(file: TaskFile, limit: int | None) -> EncoderTask | None:
    """The items of a file; None where its first line is for another kind of model."""
    [(_, first)] = file.records(lambda _: {}, FORMAT_HINT, 1)
    corpus: Sequence[str] = ()
    items: Sequence[Any]
    if "passages" in first:
        metrics, hint = _ranked, _RANKING
        items = []
        for at, line in file.records(lambda _: _RANKED, hint, limit):
            passages = line["passages"]
            places = {place: place for place in range(len(passages))}
            items.append(Query(line["query"], _relevant(at, line, places, hint), passages))
    elif "id" in first or "relevant" in first:
        metrics, hint = _retrieved, _RETRIEVAL
        corpus, items = _corpus_and_queries(file, limit)
    elif "label" in first:
        metrics, hint = _classified, _LABELS
        lines = file.records(_labelled, hint, limit)
        items = [Judged(_texts(line), line["label"]) for _, line in lines]
    elif _PAIR.keys() & first:
        metrics, hint = _alike, _PAIRS
        lines = file.records(lambda _: _SCORED, hint, limit)
        items = [Judged(_texts(line), line["score"]) for _, line in lines]
        if len({pair.right for pair in items}) < 2:
            raise broken(f"{file.source}: all scores are the same, so there is no order.", hint)
    else:
        return None
    if not items:
        raise broken(f"{file.source} holds no query.", hint)
    return EncoderTask(file.name, file.source, file.sha256, items, metrics, corpus)


def _labelled(line: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"label": str | int, **(_PAIR if _PAIR.keys() & line else {"text": Text})}


def _texts(line: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(line[key] for key in (_PAIR if _PAIR.keys() & line else ("text",)))


def _corpus_and_queries(file: TaskFile, limit: int | None) -> tuple[list[str], list[Query]]:
    lines = file.records(
        lambda line: _ASKED if "query" in line else {"id": Text, "text": Text}, _RETRIEVAL
    )
    corpus = dict[str, str]()
    for where, line in lines:
        if "query" not in line and line["id"] in corpus:
            raise broken(f"{where}: the passage {line['id']!r} is there twice.", _RETRIEVAL)
        corpus |= {line["id"]: line["text"]} if "query" not in line else {}
    asking = [(where, line) for where, line in lines if "query" in line][:limit]
    places = {name: place for place, name in enumerate(corpus)}
    queries = [Query(line["query"], _relevant(at, line, places, _RETRIEVAL)) for at, line in asking]
    return [*corpus.values()], queries


def _relevant(
    where: str, line: Mapping[str, Any], places: Mapping[Any, int], hint: str
) -> frozenset[int]:
    """The places of passages by what a line calls them: names, or places themselves."""
    missing = [name for name in line["relevant"] if name not in places]
    if missing:
        words = f'"relevant" names {missing[0]!r}, which is none of {len(places)} passages'
        raise broken(f"{where}: {words}.", hint)
    return frozenset(places[name] for name in line["relevant"])
