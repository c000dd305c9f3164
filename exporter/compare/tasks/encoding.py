"""Tasks for encoders: their local items, and one arm's scores of them.

Retrieval by cosine has ``ndcg@10`` (Järvelin and Kekäläinen, 2002) and ``recall@10``; ranking, by a
reranker's logit or by cosine, ``ndcg@10`` and ``mrr@10``; pairs ``spearman``, the rank correlation
of their similarities with people's scores; classes ``acc`` and ``f1``, averaged over the classes.
The mean over items is the figure, also of those that are no means: an item then has the figure plus
its influence on it, whose spread is that of the figure (the delta method).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from exporter.compare.agreement import LOGITS, check_tokens
from exporter.compare.encoder_quality import class_log_probabilities, embed, embedding_output
from exporter.compare.tasks.items import TaskFile, TaskScores, text_in, texts_in
from exporter.engines.runners.base import Runner
from exporter.errors import ComparisonError, TaskError
from exporter.models.ablation.damage import Floats
from exporter.models.model_folder import ModelFolder
from exporter.models.sentence_folder import pooling_of, read_prompts
from exporter.models.texts.passages import LONGEST_PAIR, LONGEST_PASSAGE, cut_to
from exporter.models.texts.tokenizer import tokenizer_in
from exporter.progress import QUIET, Progress
from graph_passes.types import number_in

_BEST = 10
_OF_TEXTS = 2  # the rank of logits of one class for each text
_NO_AND_YES = 2  # classes of a reranker, also of one with a single logit
_PROMPTS = {"query": ("query",), "passage": ("document", "passage", "corpus")}
"""The names of the prompts that stand before each kind of text, the first that a folder has."""


class TaskEncoder:
    """Embeds and classifies texts."""

    def __init__(
        self,
        runner: Runner,
        folder: ModelFolder,
        *,
        vocabulary: int | None = None,  # tokens that the model knows; None: that isn't known
        longest: int | None = None,  # tokens at which texts and pairs are cut; None: 128 and 256
        progress: Progress = QUIET,
    ) -> None:
        if folder.tokenizer is None:
            raise TaskError(
                f"There is no tokenizer.json next to {folder.onnx}, and tasks need one.",
                "Copy the model's tokenizer there.",
                code="no-tokenizer",
            )
        self._runner, self._folder, self._progress = runner, folder, progress
        self._vocabulary, self._longest = vocabulary, longest
        self._tokenizer = tokenizer_in(folder.tokenizer)
        self._pooling, self._prompts = pooling_of(folder.home), read_prompts(folder.home)

    def embed(self, texts: Sequence[str], kind: str = "") -> Floats:
        """Embeddings of length 1, ``[texts, size]``."""
        return self.embed_with(_PROMPTS.get(kind, ()), texts)

    def embed_with(
        self, prompts: Sequence[str], texts: Sequence[str], *, unit_length: bool = True
    ) -> Floats:
        """Embeddings behind a prompt, ``[texts, size]``; see :meth:`embed`."""
        if embedding_output(self._runner.outputs) is None:
            raise ComparisonError(
                f"{self._folder.onnx} gives no embeddings, so it can't compare texts.",
                "Leave this task out, or name a sentence encoder.",
                code="no-embeddings",
            )
        prompt = self._prompts.of(*prompts)
        return embed(
            self._runner,
            [self._ids(prompt + text) for text in texts],
            arm="model",
            pooling=self._pooling,
            unit_length=unit_length,
            progress=self._progress,
        )

    def _ids(self, text: str) -> NDArray[np.int64]:
        longest = self._fitting(LONGEST_PASSAGE)
        return self._checked(cut_to(self._tokenizer, text, longest))

    def _fitting(self, tokens: int) -> int:
        wanted = self._longest or tokens
        return min(wanted, self._folder.longest_sequence or wanted)

    def _checked(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        ids = np.array(tokens, np.int64)
        if self._vocabulary is not None:
            check_tokens(int(ids.max(initial=0)), self._vocabulary)
        return ids

    def log_probabilities(self, texts: Sequence[tuple[str, ...]]) -> Floats:
        """Of the classes of each text or pair, ``[texts, classes]``."""
        if not self.classifies:
            raise ComparisonError(
                f"{self._folder.onnx} doesn't give each text one class.",
                "Leave this task out, or name a classifier of texts.",
                code="no-classes",
            )
        ids, types = zip(*(self._encoded(*names) for names in texts), strict=True)
        rows = class_log_probabilities(
            self._runner, ids, arm="model", types=types, progress=self._progress
        )
        return np.concatenate(rows)

    def _encoded(self, *texts: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens of a text or a pair, and of which text each is."""
        if len(texts) == 1:
            ids = self._ids(texts[0])
            return ids, np.zeros_like(ids)
        numbers, types = self._tokenizer.pair(texts[0], texts[1], self._fitting(LONGEST_PAIR))
        return self._checked(numbers), np.array(types, np.int64)

    @property
    def classifies(self) -> bool:
        """Whether the model gives each text one class."""
        outputs = {spec.name: spec.shape for spec in self._runner.outputs}
        return len(outputs.get(LOGITS, ())) == _OF_TEXTS

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


def score_encoder_task(task: EncoderTask, encoder: TaskEncoder) -> TaskScores:
    """One arm's scores."""
    result = task.asked
    if isinstance(result, Retrieval):
        metrics = _retrieved(result, encoder)
    elif isinstance(result, Ranking):
        metrics = _ranked(result, encoder)
    elif isinstance(result, Similarities):
        metrics = _alike(result, encoder)
    else:
        metrics = _classified(task.name, result, encoder)
    text = f"{task.source}, {len(result.items)} items (SHA-256 {task.sha256[:12]})"
    return TaskScores(task=task.name, source=text, metrics=metrics)


def _retrieved(retrieval: Retrieval, encoder: TaskEncoder) -> dict[str, Floats]:
    corpus = encoder.embed(retrieval.corpus, "passage")
    queries = encoder.embed([query.text for query in retrieval.items], "query")
    hits = [
        best_hits(cosines, query.relevant)
        for query, cosines in zip(retrieval.items, queries @ corpus.T, strict=True)
    ]
    shares = [hit.sum() / len(q.relevant) for hit, q in zip(hits, retrieval.items, strict=True)]
    return {f"ndcg@{_BEST}": discounted_gains(retrieval, hits), f"recall@{_BEST}": np.array(shares)}


def _ranked(ranking: Ranking, encoder: TaskEncoder) -> dict[str, Floats]:
    pairs = zip(ranking.items, _relevances(ranking.items, encoder), strict=True)
    hits = [best_hits(scores, query.relevant) for query, scores in pairs]
    first = [1 / (hit.argmax() + 1) if hit.any() else 0.0 for hit in hits]
    return {f"ndcg@{_BEST}": discounted_gains(ranking, hits), f"mrr@{_BEST}": np.array(first)}


def _relevances(queries: Sequence[RankedQuery], encoder: TaskEncoder) -> list[Floats]:
    """Of each query's passages, ``[passages]``: the yes of a reranker, else the cosine."""
    ends = np.cumsum([len(query.passages) for query in queries])[:-1]
    pairs = [(query.text, passage) for query in queries for passage in query.passages]
    if encoder.classifies:
        return np.split(reranked(encoder, pairs), ends)
    asking = encoder.embed([query.text for query in queries], "query")
    parts = np.split(encoder.embed([passage for _, passage in pairs], "passage"), ends)
    return [passages @ query for passages, query in zip(parts, asking, strict=True)]


def reranked(encoder: TaskEncoder, pairs: Sequence[tuple[str, str]]) -> Floats:
    """A reranker's logit of the yes against the no, ``[pairs]``."""
    likely = encoder.log_probabilities(pairs)
    if likely.shape[1] != _NO_AND_YES:
        raise ComparisonError(
            f"The model has {likely.shape[1]} classes, of which none is known to be the yes.",
            "Rank with a reranker: one logit, or two of which the second is the yes.",
            code="no-reranker",
        )
    # The log-probability of a sure yes is 0 within rounding, and many were alike.
    yes: Floats = likely[:, 1] - likely[:, 0]
    return yes


def best_hits(scores: Floats, relevant: frozenset[int]) -> NDArray[np.bool_]:
    """Of the ten highest scores, best first, whether they are of relevant passages."""
    best = np.argsort(-scores, kind="stable")[:_BEST]
    return np.isin(best, list(relevant))


def discounted_gains(asked: Retrieval | Ranking, hits: Sequence[NDArray[np.bool_]]) -> Floats:
    """The discounted gain of each query, as a share of the best that there is."""
    gain = 1 / np.log2(np.arange(2, _BEST + 2))
    best = np.array([gain[: len(query.relevant)].sum() for query in asked.items])
    floats: Floats = np.array([gain[: len(hit)][hit].sum() for hit in hits]) / best
    return floats


def _alike(similarities: Similarities, encoder: TaskEncoder) -> dict[str, Floats]:
    people = np.array([pair.score for pair in similarities.items])
    if encoder.classifies:
        floats = reranked(encoder, [pair.texts for pair in similarities.items])
    else:
        first, second = (
            encoder.embed([pair.texts[at] for pair in similarities.items]) for at in (0, 1)
        )
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


def _classified(name: str, labels: Labels, encoder: TaskEncoder) -> dict[str, Floats]:
    likely = encoder.log_probabilities([item.texts for item in labels.items])
    right = np.array([_number(name, item.label, encoder, likely.shape[1]) for item in labels.items])
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


RETRIEVAL_HINT = (
    'Each line is {"id": NAME, "text": TEXT} or {"query": TEXT, "relevant": [NAME, ...]}.'
)
RANKING_HINT = 'Each line is {"query": TEXT, "passages": [TEXT, ...], "relevant": [PLACE, ...]}.'
PAIR_HINT = 'Each line is {"sentence1": TEXT, "sentence2": TEXT, "score": NUMBER}.'
LABEL_HINT = 'Each line is {"text": TEXT, "label": NAME or NUMBER}, or has a pair of sentences.'

_SIDES = ("sentence1", "sentence2")


@dataclass(frozen=True)
class Query:
    """A text, and the passages that answer it, by their place in the corpus."""

    text: str
    relevant: frozenset[int]


@dataclass(frozen=True)
class Retrieval:
    """Queries into one corpus."""

    corpus: tuple[str, ...]
    items: tuple[Query, ...]


@dataclass(frozen=True)
class RankedQuery:
    """A text, its own passages, and the places of those that answer it, from 0."""

    text: str
    passages: tuple[str, ...]
    relevant: frozenset[int]


@dataclass(frozen=True)
class Ranking:
    """Queries, each with passages to put in order."""

    items: tuple[RankedQuery, ...]


@dataclass(frozen=True)
class ScoredPair:
    """Two texts, and how alike they are."""

    texts: tuple[str, str]
    score: float


@dataclass(frozen=True)
class Similarities:
    """Pairs that people have scored."""

    items: tuple[ScoredPair, ...]


@dataclass(frozen=True)
class LabelledText:
    """A text or a pair, and its class, by name or number."""

    texts: tuple[str, ...]
    label: str | int


@dataclass(frozen=True)
class Labels:
    """Texts with their classes."""

    items: tuple[LabelledText, ...]


Asked = Retrieval | Ranking | Similarities | Labels


@dataclass(frozen=True)
class EncoderTask:
    """A task for encoders."""

    name: str
    source: str
    asked: Asked
    sha256: str

    @property
    def items(self) -> Sequence[Query | RankedQuery | ScoredPair | LabelledText]:
        """In their order."""
        return self.asked.items


def encoder_task(file: TaskFile, limit: int | None) -> EncoderTask | None:
    """The items of a file; None where its first line is for another kind of model."""
    [(_, first)] = file.records(1)
    if "passages" in first:
        result: Asked = Ranking(tuple(_ranked_query(*record) for record in file.records(limit)))
    elif "id" in first or "relevant" in first:
        result = _retrieval(file, limit)
    elif "label" in first:
        result = Labels(tuple(_labelled(*record) for record in file.records(limit)))
    elif "sentence1" in first or "sentence2" in first:
        result = _similarities(file, limit)
    else:
        return None
    return EncoderTask(file.name, file.source, result, file.sha256)


def _retrieval(file: TaskFile, limit: int | None) -> Retrieval:
    corpus: dict[str, str] = {}
    records = file.records()
    for where, record in records:
        if "query" in record:
            continue
        name = text_in(record, "id", where, RETRIEVAL_HINT)
        if name in corpus:
            raise TaskError(
                f"{where}: the passage {name!r} is there twice.", RETRIEVAL_HINT, code="named-twice"
            )
        corpus[name] = text_in(record, "text", where, RETRIEVAL_HINT)
    places = {name: place for place, name in enumerate(corpus)}
    asking = [item for item in records if "query" in item[1]][:limit]
    items = tuple(_query(*item, places) for item in asking)
    if not items:
        raise TaskError(f"{file.source} holds no query.", RETRIEVAL_HINT, code="no-items")
    return Retrieval(tuple(corpus.values()), items)


def _query(where: str, record: Mapping[str, Any], places: Mapping[str, int]) -> Query:
    text = text_in(record, "query", where, RETRIEVAL_HINT)
    named = record.get("relevant")
    names: list[Any] = named if isinstance(named, list) and named else [None]
    missing = [name for name in names if not isinstance(name, str) or name not in places]
    if missing:
        raise TaskError(
            f'{where}: "relevant" names {missing[0]!r}, which no passage is called.',
            RETRIEVAL_HINT,
            code="passage-missing",
        )
    return Query(text, frozenset(places[name] for name in names))


def _ranked_query(where: str, record: Mapping[str, Any]) -> RankedQuery:
    query = text_in(record, "query", where, RANKING_HINT)
    passages = texts_in(record, "passages", where, RANKING_HINT)
    value = record.get("relevant")
    places: list[Any] = value if isinstance(value, list) and value else [None]
    wrong = [place for place in places if type(place) is not int or not 0 <= place < len(passages)]
    if wrong:
        raise TaskError(
            f'{where}: "relevant" names {wrong[0]!r}, which is none of the {len(passages)} places.',
            RANKING_HINT,
            code="passage-missing",
        )
    return RankedQuery(query, tuple(passages), frozenset(places))


def _similarities(file: TaskFile, limit: int | None) -> Similarities:
    similarities = Similarities(tuple(_scored(*record) for record in file.records(limit)))
    if len({pair.score for pair in similarities.items}) < 2:
        raise TaskError(
            f"{file.source}: all pairs have the same score, so there is no order.",
            PAIR_HINT,
            code="one-score",
        )
    return similarities


def _scored(where: str, record: Mapping[str, Any]) -> ScoredPair:
    score = record.get("score")
    pair = _pair(where, record)
    if not isinstance(score, int | float) or isinstance(score, bool) or score != score:
        raise TaskError(f'{where}: "score" is {score!r}, no number.', PAIR_HINT, code="no-score")
    return ScoredPair(pair, float(score))


def _pair(where: str, record: Mapping[str, Any]) -> tuple[str, str]:
    sides = [key for key in _SIDES if str(record.get(key) or "").strip()]
    if len(sides) < 2:
        raise TaskError(
            f"{where}: a pair needs both sentence1 and sentence2; it has {sides or 'neither'}.",
            PAIR_HINT,
            code="one-sided",
        )
    first, second = (text_in(record, key, where, PAIR_HINT) for key in sides)
    return first, second


def _labelled(where: str, record: Mapping[str, Any]) -> LabelledText:
    label = record.get("label")
    if not isinstance(label, str | int) or isinstance(label, bool):
        raise TaskError(f'{where}: "label" is {label!r}.', LABEL_HINT, code="no-label")
    if any(side in record for side in _SIDES):
        return LabelledText(_pair(where, record), label)
    return LabelledText((text_in(record, "text", where, LABEL_HINT),), label)
