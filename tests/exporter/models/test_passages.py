"""Paragraphs as samples: what is one, how long, and how many."""

from __future__ import annotations

import numpy as np

from exporter.models.texts.passages import pack_passages, paragraphs
from exporter.models.texts.sources import TextSource
from exporter.models.texts.tokenizer import TextTokenizer

_LONG = "a paragraph of more than forty characters, surely"


def _source(*documents: str) -> TextSource:
    return TextSource("made", documents, "0" * 64)


def _encode(text: str, special: bool) -> list[int]:
    """A token a word: its length; 101 before and 102 behind."""
    ids = [len(word) for word in text.split()]
    return [101, *ids, 102] if special else ids


TOKENIZER = TextTokenizer(_encode)


def test_headings_and_repetitions_are_left_out() -> None:
    source = _source(f"Heading\n\n{_LONG}\n \n{_LONG}\n\n{_LONG}\nand a second line", "\n\n")
    assert paragraphs(source) == [_LONG, f"{_LONG} and a second line"]


def test_a_text_of_short_lines_gives_these() -> None:
    assert paragraphs(_source("how to sort\n\nhow to sort\n\nlist")) == ["how to sort", "list"]


def test_each_paragraph_is_a_padded_sample_with_the_tokenizers_ends() -> None:
    ids, mask = pack_passages(
        TOKENIZER, _source("a bb ccc", "dddd"), longest=6, tokens=100
    )  # fmt: skip
    assert [row[own].tolist() for row, own in zip(ids, mask, strict=True)] == [
        [101, 1, 2, 3, 102], [101, 4, 102],
    ]  # fmt: skip
    assert ids.shape == mask.shape == (2, 6)
    assert ids.dtype == np.int64


def test_a_long_paragraph_makes_several_samples() -> None:
    ids, mask = pack_passages(TOKENIZER, _source("a bb ccc dddd e"), longest=4, tokens=100)
    assert [row[own].tolist() for row, own in zip(ids, mask, strict=True)] == [
        [101, 1, 2, 102], [101, 3, 4, 102], [101, 1, 102],
    ]  # fmt: skip


def test_it_reads_no_more_than_is_wanted() -> None:
    source = _source("a bb", "ccc dddd", "e")
    assert len(pack_passages(TOKENIZER, source, longest=8, tokens=5)[0]) == 2
    assert len(pack_passages(TOKENIZER, source, longest=8, tokens=4)[0]) == 1


def test_no_text_no_samples() -> None:
    ids, mask = pack_passages(TOKENIZER, _source(" "), longest=8, tokens=5)
    assert ids.shape == mask.shape == (0, 8)
