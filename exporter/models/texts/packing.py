"""From the units of a text to samples of equal length."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from exporter.models.texts.documents import Unit, Units

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
    max_samples: int | None = None,
    separator_id: int | None = None,
    by_size: bool = False,
) -> Windows:
    """Cuts a text's units into samples of equal length, without padding, and draws some of them.

    The first samples are the same however many are drawn. What doesn't fill a unit's last sample
    is left out; units that are too short for one fill it together.

    Args:
        encode: Text to token ids, without special tokens.
        units: Of the text; they are tokenised only as far as they are needed.
        sequence_length: Tokens per sample.
        max_samples: How many samples to take at most; None takes all.
        separator_id: A token that is put after each document; None puts none.
        by_size: As for :meth:`exporter.models.texts.documents.Units.drawn`.
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
        *pieces, last = _pieces(document)
        for piece in [*((piece, False) for piece in pieces), (last, True)]:
            if sum(len(text) for text, _ in segments[-1]) >= _SEGMENT_CHARACTERS:
                segments.append([])
            segments[-1].append(piece)
    if len(segments) > 1 and sum(len(text) for text, _ in segments[-1]) < _SEGMENT_CHARACTERS / 2:
        segments[-2:] = [segments[-2] + segments[-1]]
    return segments


def _pieces(document: str) -> Iterator[str]:
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
