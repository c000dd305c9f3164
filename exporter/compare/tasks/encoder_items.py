"""Local items for encoders: retrieval, ranking, pairs with a score, texts with a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.compare.tasks.items import TaskFile, text_in, texts_in
from exporter.errors import TaskError

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
        result: Asked = Ranking(tuple(_ranked(*record) for record in file.records(limit)))
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


def _ranked(where: str, record: Mapping[str, Any]) -> RankedQuery:
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
