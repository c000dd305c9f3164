"""Pairs of texts in the lines of a file, as the tasks for rerankers have them.

``{"query": ..., "passage": ...}``, ``{"query": ..., "passages": [...]}``, ``{"sentence1": ...,
"sentence2": ...}``; or ``{"id": ..., "text": ...}`` and ``{"query": ..., "relevant": [id, ...]}``,
where each query has a pair with each relevant passage, and one with the passage behind that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from exporter.errors import TextSourceError

TextPair = tuple[str, str]
Line = tuple[Mapping[str, Any], str]
"""An object, and where it stands."""

_SENTENCES = ("sentence1", "sentence2")
_HINT = (
    'Each line is {"query": TEXT, "passage": TEXT}, {"query": TEXT, "passages": [TEXT, ...]} or '
    '{"sentence1": TEXT, "sentence2": TEXT}.'
)


def pairs_in(lines: Sequence[Line]) -> list[list[TextPair]] | None:
    """The pairs of each line; None where the first one, or no query, asks for pairs."""
    first = lines[0][0] if lines else {}
    if any(key in first for key in _SENTENCES):
        return [[_both(line, where, *_SENTENCES)] for line, where in lines]
    if "query" in first and ("passage" in first or "passages" in first):
        return [list(_of_query(line, where)) for line, where in lines]
    if any("query" in line and "relevant" in line for line, _ in lines):
        return list(_into_corpus(lines))
    return None


def _of_query(line: Mapping[str, Any], where: str) -> Iterator[TextPair]:
    passages = line.get("passages")
    if passages is None:
        yield _both(line, where, "query", "passage")
        return
    if not isinstance(passages, list) or not passages:
        raise _one_sided(where, '"passages" is no list of texts')
    for number, passage in enumerate(passages):
        told = {"query": line.get("query"), f"passages[{number}]": passage}
        yield _both(told, where, *told)


def _into_corpus(lines: Sequence[Line]) -> Iterator[list[TextPair]]:
    corpus = {
        str(line.get("id")): _text(line, "text", where)
        for line, where in lines
        if "query" not in line
    }
    names = list(corpus)
    for line, where in lines:
        if "query" not in line:
            continue
        query, relevant = _text(line, "query", where), line.get("relevant")
        if not isinstance(relevant, list) or not relevant or not {*map(str, relevant)} <= {*names}:
            raise _one_sided(where, '"relevant" names no passages')
        found = []
        for name in map(str, relevant):
            behind = names[(names.index(name) + 1) % len(names)]
            found += [(query, corpus[name]), (query, corpus[behind])]
        yield found


def _both(line: Mapping[str, Any], where: str, first: str, second: str) -> TextPair:
    return _text(line, first, where), _text(line, second, where)


def _text(line: Mapping[str, Any], key: str, where: str) -> str:
    text = line.get(key)
    if not isinstance(text, str) or not text.strip():
        raise _one_sided(where, f'"{key}" holds no text')
    return text


def _one_sided(where: str, what: str) -> TextSourceError:
    return TextSourceError(f"{where}: {what}; a pair has two sides.", _HINT, code="one-sided")
