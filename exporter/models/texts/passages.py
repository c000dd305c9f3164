"""Paragraphs of a text, as encoders embed them: one sample each, of different lengths."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from exporter.errors import CalibrationError
from exporter.models.texts.documents import Unit, Units, normalised_paragraphs
from exporter.models.texts.samples import CalibrationText
from exporter.models.texts.sources import TextPair, TextSource
from exporter.models.texts.tokenizer import TextTokenizer
from exporter.progress import QUIET, Progress

LONGEST_PASSAGE = 128  # tokens, as sentence-transformers trains its small encoders
LONGEST_PAIR = 256  # tokens of a query and its passage together
_CHARACTERS = 40  # shorter paragraphs are headings
_SENTENCE = re.compile(r"(.{20,200}?[.!?])\s+(?=\S)")
_SHORTEST = 40  # characters of the rest of a passage


def paragraphs(texts: TextSource) -> list[str]:
    """The paragraphs of all documents, each once; those without text are left out, and headings.

    A text of nothing but short lines, such as queries, gives these.
    """
    return _paragraphs(texts.documents)


def _paragraphs(documents: Iterable[str]) -> list[str]:
    parts = chain.from_iterable(map(normalised_paragraphs, documents))
    whole = [*dict.fromkeys(filter(None, parts))]
    return [part for part in whole if len(part) >= _CHARACTERS] or whole


def drawn_paragraphs(units: Units, *, by_size: bool = False) -> Iterator[tuple[int, str]]:
    """The same of units, at random, with the numbers of these."""
    left = dict.fromkeys(_paragraphs(chain.from_iterable(units.parts)))

    def read(unit: Unit) -> list[str]:
        parts = [*chain.from_iterable(map(normalised_paragraphs, unit))]
        return [part for part in parts if left.pop(part, part) is None]

    return units.drawn(lambda unit: [unit], read, by_size=by_size)


def halves(passage: str) -> TextPair | None:
    """A passage's first sentence and the rest of it; None where there are no such."""
    match = _SENTENCE.match(passage)
    if match is None or len(passage) - match.end() < _SHORTEST:
        return None
    return match[1], passage[match.end() :]


def pairs_of(texts: TextSource) -> list[TextPair]:
    """A text's own pairs; else first sentences with what follows and with what doesn't.

    Each first sentence has two pairs, one after the other: with the rest of its own passage, and
    with the rest of the next passage, which is of the same matter. Which of them comes first
    changes from one sentence to the next, so that every second pair is none of a kind. Empty
    where fewer than two passages have a first sentence.
    """
    return list(texts.pairs) or _made_pairs(paragraphs(texts))


def _made_pairs(passages: Iterable[str]) -> list[TextPair]:
    parts = [part for part in map(halves, passages) if part is not None]
    made: list[TextPair] = []
    for number, (first, rest) in enumerate(parts if len(parts) > 1 else ()):
        two = [(first, rest), (first, parts[(number + 1) % len(parts)][1])]
        made += two[:: -1 if number % 2 else 1]
    return made


def drawn_pairs(
    texts: TextSource, units: Units, *, by_size: bool = False
) -> Iterator[tuple[int, TextPair]]:
    """What :func:`pairs_of` makes of each unit, at random; two that stand together stay so."""
    own = dict(zip(texts.documents, texts.line_pairs, strict=False))
    passages = set(_paragraphs(chain.from_iterable(units.parts)))

    def couples(unit: Unit) -> list[Sequence[TextPair]]:
        parts = dict.fromkeys(chain.from_iterable(map(normalised_paragraphs, unit)))
        pairs = [*chain.from_iterable(own[document] for document in unit)] if own else []
        pairs = pairs or _made_pairs(part for part in parts if part in passages)
        return [pairs[at : at + 2] for at in range(0, len(pairs), 2)]

    odd: list[tuple[int, TextPair]] = []
    for unit, two in units.drawn(lambda unit: [unit], couples, by_size=by_size):
        if len(two) == 2:
            yield from ((unit, pair) for pair in two)
        else:
            odd += [(unit, pair) for pair in two]
    yield from odd


def pairs_to_read(
    texts: TextSource, *, scores_pairs: bool, progress: Progress = QUIET
) -> Sequence[TextPair]:
    """What a classifier of texts reads as pairs: those of a file; a reranker always."""
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


Form = Literal["windows", "paragraphs", "pairs"]
"""Windows over a whole text, all of them full; or its paragraphs or pairs, padded."""


def sampled(
    form: Form, tokenizer: TextTokenizer, texts: TextSource, units: Units, *, tokens: int,
    longest: int,
) -> CalibrationText:  # fmt: skip
    """Samples with the tokenizer's own tokens, as many as have so many, or all there are."""
    before, after = tokenizer.ends
    ends = 1 + len(tokenizer.pair("a", "a", longest)[0]) if form == "pairs" else len(before + after)
    if longest <= ends:
        raise CalibrationError(
            f"Samples of {longest} tokens hold no text: the tokenizer puts {ends} tokens around "
            "it.",
            f"Ask for a --sequence-length of {ends + 1} or more, such as 512.",
            code="length-out-of-range",
        )
    if form == "windows":
        windows, documents = pack_tokens(
            tokenizer.plain,
            units,
            sequence_length=longest - ends,
            max_samples=tokens // longest,
            separator_id=None if after else tokenizer.end_id,
        )
        ids, content = with_ends(before, windows, after), texts.content.written()
        return CalibrationText.unpadded(ids, texts.source, texts.sha256, documents, content)
    rows: Iterable[Row]
    if form == "pairs":
        drawn = drawn_pairs(texts, units)
        rows = ((unit, *tokenizer.pair(*pair, longest)) for unit, pair in drawn)
    else:
        rows = (
            (unit, ids, None)
            for unit, paragraph in drawn_paragraphs(units)
            for ids in _pieces(tokenizer, paragraph, longest)
        )
    return first_rows(texts, rows, tokens, longest)


Row = tuple[int, Sequence[int], Sequence[int] | None]
"""A sample's unit, its tokens, and of which text of a pair each is."""


def first_rows(
    texts: TextSource, rows: Iterable[Row], tokens: int, longest: int
) -> CalibrationText:
    """The first of some samples, as many as have the wanted tokens, or all there are."""
    kept = []
    count = 0
    for row in rows:
        kept.append(row)
        count += len(row[1])
        if count >= tokens:
            break
    ids, mask = _padded([row for _, row, _ in kept], longest)
    types = [types for _, _, types in kept if types is not None]
    documents = np.array([unit for unit, _, _ in kept], np.int64)
    typed = _padded(types, longest)[0] if types and len(types) == len(kept) else None
    content = texts.content.written()
    return CalibrationText.unpadded(
        ids, texts.source, texts.sha256, documents, content, mask=mask, types=typed
    )


def _padded(
    rows: Sequence[Sequence[int]], longest: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    lengths = np.array([len(row) for row in rows], np.int64)
    mask = np.arange(longest) < lengths[:, None]
    # Any token of the vocabulary pads, as the mask leaves it out.
    ids = [[*row, *[row[-1]] * (longest - len(row))] for row in rows]
    return np.array(ids, np.int64).reshape(len(rows), longest), mask


def _pieces(tokenizer: TextTokenizer, paragraph: str, longest: int) -> Iterator[list[int]]:
    before, after = tokenizer.ends
    room = longest - len(before) - len(after)
    ids = tokenizer.plain(paragraph)
    for start in range(0, len(ids), room):
        yield [*before, *ids[start : start + room], *after]


_SEGMENT_CHARACTERS = 32_000  # so that a book isn't tokenised whole for a few of its pages

Piece = tuple[str, bool]
"""A part of a document, and whether it is the last one."""


class Windows(NamedTuple):
    """Token ids ``[samples, tokens]``, and of which unit each sample is, ``[samples]``."""

    ids: NDArray[np.int64]
    documents: NDArray[np.int64]


def pack_tokens(
    encode: Callable[[str], list[int]],
    units: Units,
    *,
    sequence_length: int,
    max_samples: int | None = None,  # how many samples to take at most; None takes all
    separator_id: int | None = None,  # a token that is put after each document; None puts none
    by_size: bool = False,
) -> Windows:
    """Cuts a text's units into samples of equal length, without padding, and draws some of them.

    The first samples are the same however many are drawn. What doesn't fill a unit's last sample
    is left out; units that are too short for one fill it together.
    """
    rows: list[list[int]] = []
    documents: list[int] = []
    short: list[int] = []
    first = 0
    read = partial(_runs, encode, sequence_length, separator_id)
    for unit, run in units.drawn(_segments, read, by_size=by_size):
        if len(run) < sequence_length:
            first = first if short else unit
            short += run
            if len(short) < sequence_length:
                continue
            unit, run, short = first, short[:sequence_length], []
        rows.append(run)
        documents.append(unit)
        if len(rows) == max_samples:
            break
    ids = np.array(rows, np.int64).reshape(len(rows), sequence_length)
    return Windows(ids, np.array(documents, np.int64))


def with_ends(
    before: Sequence[int], samples: NDArray[np.int64], after: Sequence[int] = ()
) -> NDArray[np.int64]:
    """Puts the same tokens before and behind each sample, ``[samples, tokens]``."""
    ends = [np.tile(np.array(ids, np.int64), (len(samples), 1)) for ids in (before, after)]
    return np.concatenate([ends[0], samples, ends[1]], axis=1)


def _runs(
    encode: Callable[[str], list[int]], length: int, separator: int | None, pieces: Sequence[Piece]
) -> list[list[int]]:
    """The whole samples of some pieces of text; of fewer tokens than one sample these."""
    stream: list[int] = []
    for piece, is_last in pieces:
        stream += encode(piece)
        if is_last and separator is not None:
            stream.append(separator)
    ends = range(length, len(stream) + 1, length)
    return [stream[end - length : end] for end in ends] or [stream]


def _segments(unit: Unit) -> list[list[Piece]]:
    """As much of a unit as is tokenised at once; a short end goes with what is before it."""
    segments: list[list[Piece]] = [[]]
    for document in unit:
        *pieces, last = _packing_pieces(document)
        for piece in [*((piece, False) for piece in pieces), (last, True)]:
            if sum(len(text) for text, _ in segments[-1]) >= _SEGMENT_CHARACTERS:
                segments.append([])
            segments[-1].append(piece)
    if len(segments) > 1 and sum(len(text) for text, _ in segments[-1]) < _SEGMENT_CHARACTERS / 2:
        segments[-2:] = [segments[-2] + segments[-1]]
    return segments


def _packing_pieces(document: str) -> Iterator[str]:
    """Cuts a long document where a line begins with text, where no token crosses."""
    start = 0
    line_start = re.compile(r"\n(?=\S)")
    while len(document) - start > _SEGMENT_CHARACTERS:
        cut = line_start.search(document, start + _SEGMENT_CHARACTERS)
        if cut is None:
            break
        yield document[start : cut.end()]
        start = cut.end()
    yield document[start:]
