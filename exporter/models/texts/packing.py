"""From documents to samples of equal length."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from exporter.models.texts.sources import TextSource

_PIECE_CHARACTERS = 200_000  # so that a book isn't tokenised whole for its first pages


def pack_tokens(
    encode: Callable[[str], list[int]],
    texts: TextSource,
    *,
    sequence_length: int,
    max_samples: int | None = None,
    separator_id: int | None = None,
) -> NDArray[np.int64]:
    """Cuts the documents' token stream into samples of equal length, without padding.

    Documents are tokenised only as far as they are needed; what doesn't fill the last sample is
    left out.

    Args:
        encode: Text to token ids, without special tokens.
        texts: The documents.
        sequence_length: Tokens per sample.
        max_samples: How many samples to take at most; None takes all.
        separator_id: A token that is put after each document; None puts none.

    Returns:
        Token ids, ``[samples, sequence_length]``; no row when the text is too short.
    """
    wanted = None if max_samples is None else max_samples * sequence_length
    stream: list[int] = []
    for ids in _token_runs(encode, texts.documents, separator_id):
        stream.extend(ids)
        if wanted is not None and len(stream) >= wanted:
            break
    samples = len(stream) // sequence_length
    if max_samples is not None:
        samples = min(samples, max_samples)
    kept = np.asarray(stream[: samples * sequence_length], dtype=np.int64)
    return kept.reshape(samples, sequence_length)


def with_ends(
    before: Sequence[int], samples: NDArray[np.int64], after: Sequence[int] = ()
) -> NDArray[np.int64]:
    """Puts the same tokens before and behind each sample, ``[samples, tokens]``."""
    ends = [np.tile(np.array(ids, np.int64), (len(samples), 1)) for ids in (before, after)]
    return np.concatenate([ends[0], samples, ends[1]], axis=1)


def _token_runs(
    encode: Callable[[str], list[int]], documents: Iterable[str], separator_id: int | None
) -> Iterator[list[int]]:
    for document in documents:
        for piece in _pieces(document):
            yield encode(piece)
        if separator_id is not None:
            yield [separator_id]


def _pieces(document: str) -> Iterator[str]:
    """Cuts a long document where a line begins with text, where no token crosses."""
    start = 0
    line_start = re.compile(r"\n(?=\S)")
    while len(document) - start > _PIECE_CHARACTERS:
        cut = line_start.search(document, start + _PIECE_CHARACTERS)
        if cut is None:
            break
        yield document[start : cut.end()]
        start = cut.end()
    yield document[start:]
