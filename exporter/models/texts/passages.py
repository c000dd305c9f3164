"""Paragraphs of a text, as encoders embed them: one sample each, of different lengths."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from exporter.models.texts.sources import TextSource
from exporter.models.texts.tokenizer import TextTokenizer

LONGEST_PASSAGE = 128  # tokens, as sentence-transformers trains its small encoders
_CHARACTERS = 40  # shorter paragraphs are headings


def paragraphs(texts: TextSource) -> list[str]:
    """The paragraphs of all documents, each once; those without text are left out, and headings.

    A text of nothing but short lines, such as queries, gives these.
    """
    parts = (part for text in texts.documents for part in re.split(r"\n\s*\n", text))
    joined = (" ".join(part.split()) for part in parts)
    found = [*dict.fromkeys(filter(None, joined))]
    return [part for part in found if len(part) >= _CHARACTERS] or found


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
    rows: list[list[int]] = []
    found = 0
    for row in _pieces(tokenizer, texts, longest):
        rows.append(row)
        found += len(row)
        if found >= tokens:
            break
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
