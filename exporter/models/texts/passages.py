"""Paragraphs of a text, as encoders embed them: one sample each, of different lengths."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from exporter.models.texts.pair_lines import TextPair
from exporter.models.texts.sources import TextSource
from exporter.models.texts.tokenizer import TextTokenizer
from exporter.progress import QUIET, Progress

R = TypeVar("R")
LONGEST_PASSAGE = 128  # tokens, as sentence-transformers trains its small encoders
LONGEST_PAIR = 256  # tokens of a query and its passage together
_CHARACTERS = 40  # shorter paragraphs are headings
_SENTENCE = re.compile(r"(.{20,200}?[.!?])\s+(?=\S)")
_SHORTEST = 40  # characters of the rest of a passage


def paragraphs(texts: TextSource) -> list[str]:
    """The paragraphs of all documents, each once; those without text are left out, and headings.

    A text of nothing but short lines, such as queries, gives these.
    """
    parts = (part for text in texts.documents for part in re.split(r"\n\s*\n", text))
    joined = (" ".join(part.split()) for part in parts)
    found = [*dict.fromkeys(filter(None, joined))]
    return [part for part in found if len(part) >= _CHARACTERS] or found


def halves(passage: str) -> TextPair | None:
    """A passage's first sentence and the rest of it; None where there are no such."""
    found = _SENTENCE.match(passage)
    if found is None or len(passage) - found.end() < _SHORTEST:
        return None
    return found[1], passage[found.end() :]


def pairs_of(texts: TextSource) -> list[TextPair]:
    """A text's own pairs; else first sentences with what follows and with what doesn't.

    Each first sentence has two pairs, one after the other: with the rest of its own passage, and
    with the rest of the next passage, which is of the same matter. Which of them comes first
    changes from one sentence to the next, so that every second pair is none of a kind. Empty
    where fewer than two passages have a first sentence.
    """
    if texts.pairs:
        return list(texts.pairs)
    found = [each for each in map(halves, paragraphs(texts)) if each is not None]
    if len(found) < 2:
        return []
    made: list[TextPair] = []
    for number, (first, rest) in enumerate(found):
        two = [(first, rest), (first, found[(number + 1) % len(found)][1])]
        made += two[:: -1 if number % 2 else 1]
    return made


def pairs_to_read(
    texts: TextSource, *, scores_pairs: bool, progress: Progress = QUIET
) -> Sequence[TextPair]:
    """What a classifier of texts reads as pairs: those of a file; a reranker always.

    Args:
        texts: The documents.
        scores_pairs: Whether it is a reranker.
        progress: Told where one reads single texts.

    Returns:
        None of them where single texts are read.
    """
    if texts.pairs or not scores_pairs:
        return texts.pairs
    pairs = pairs_of(texts)
    if not pairs:
        progress.say(
            f"{texts.source}: read as single texts, since fewer than two paragraphs have a first "
            "sentence to pair with the rest; a reranker is best given JSON lines with query and "
            "passage"
        )
    return pairs


def cut_to(tokenizer: TextTokenizer, text: str, longest: int) -> list[int]:
    """A text's tokens with those that the tokenizer adds; a longer text loses its end."""
    before, after = tokenizer.ends
    return [*before, *tokenizer.plain(text)[: longest - len(before) - len(after)], *after]


def pack_passages(
    tokenizer: TextTokenizer, texts: TextSource, *, longest: int, tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Paragraphs from the start on, each with the tokens that the tokenizer adds to a text.

    Args:
        tokenizer: The model's.
        texts: The documents.
        longest: Tokens in a sample; a longer paragraph makes several.
        tokens: How many are wanted in all.

    Returns:
        Token ids and mask, ``[samples, longest]``; False marks padding. As many samples as have
        the wanted tokens, or all there are.
    """
    rows = _first_rows(_pieces(tokenizer, texts, longest), tokens, len)
    return _padded(rows, longest)


def pack_pairs(
    tokenizer: TextTokenizer, pairs: Iterable[TextPair], *, longest: int, tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64] | None]:
    """Pairs from the start on, each as one text with the tokens that the tokenizer adds.

    Args:
        tokenizer: The model's.
        pairs: Texts.
        longest: Tokens in a sample; the longer text of a pair loses its end.
        tokens: How many are wanted in all.

    Returns:
        Token ids, mask and of which text each token is, all ``[samples, longest]``; None in place
        of the last where the model doesn't tell texts apart so.
    """
    encoded = (tokenizer.pair(*pair, longest) for pair in pairs)
    rows = _first_rows(encoded, tokens, lambda each: len(each[0]))
    ids, mask = _padded([row for row, _ in rows], longest)
    told = [types for _, types in rows if types is not None]
    return ids, mask, _padded(told, longest)[0] if len(told) == len(rows) else None


def _first_rows(rows: Iterable[R], tokens: int, size: Callable[[R], int]) -> list[R]:
    """The first of some samples, as many as have the wanted tokens, or all there are."""
    kept: list[R] = []
    found = 0
    for row in rows:
        kept.append(row)
        found += size(row)
        if found >= tokens:
            break
    return kept


def _padded(
    rows: Sequence[Sequence[int]], longest: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    lengths = np.array([len(row) for row in rows], np.int64)
    mask = np.arange(longest) < lengths[:, None]
    # Any token of the vocabulary pads, as the mask leaves it out.
    ids = [[*row, *[row[-1]] * (longest - len(row))] for row in rows]
    return np.array(ids, np.int64).reshape(len(rows), longest), mask


def _pieces(tokenizer: TextTokenizer, texts: TextSource, longest: int) -> Iterator[list[int]]:
    before, after = tokenizer.ends
    room = longest - len(before) - len(after)
    for paragraph in paragraphs(texts):
        ids = tokenizer.plain(paragraph)
        for start in range(0, len(ids), room):
            yield [*before, *ids[start : start + room], *after]
