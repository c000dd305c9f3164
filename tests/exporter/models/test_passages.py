"""Paragraphs as samples: what is one, how long, and how many."""

from __future__ import annotations

import numpy as np

from exporter.models.texts.documents import Units
from exporter.models.texts.passages import Passages, drawn_paragraphs, pack_passages, paragraphs
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


def _packed(*documents: str, longest: int, tokens: int) -> Passages:
    drawn = drawn_paragraphs(Units.of(documents, longest))
    return pack_passages(TOKENIZER, drawn, longest=longest, tokens=tokens)


def test_headings_and_repetitions_are_left_out() -> None:
    source = _source(f"Heading\n\n{_LONG}\n \n{_LONG}\n\n{_LONG}\nand a second line", "\n\n")
    assert paragraphs(source) == [_LONG, f"{_LONG} and a second line"]


def test_a_text_of_short_lines_gives_these() -> None:
    assert paragraphs(_source("how to sort\n\nhow to sort\n\nlist")) == ["how to sort", "list"]


def test_each_paragraph_is_a_padded_sample_with_the_tokenizers_ends() -> None:
    ids, mask, types, documents = _packed("a bb ccc\n\ndddd", longest=6, tokens=100)
    assert [row[own].tolist() for row, own in zip(ids, mask, strict=True)] == [
        [101, 1, 2, 3, 102], [101, 4, 102],
    ]  # fmt: skip
    assert ids.shape == mask.shape == (2, 6)
    assert ids.dtype == np.int64
    assert types is None
    assert documents.tolist() == [0, 0]


def test_a_long_paragraph_makes_several_samples() -> None:
    ids, mask, *_ = _packed("a bb ccc dddd e", longest=4, tokens=100)
    assert [row[own].tolist() for row, own in zip(ids, mask, strict=True)] == [
        [101, 1, 2, 102], [101, 3, 4, 102], [101, 1, 102],
    ]  # fmt: skip


def test_it_reads_no_more_than_is_wanted() -> None:
    text = "a bb\n\nccc dddd\n\ne"
    assert len(_packed(text, longest=8, tokens=5).ids) == 2
    assert len(_packed(text, longest=8, tokens=4).ids) == 1


def test_no_text_no_samples() -> None:
    ids, mask, *_ = _packed(" ", longest=8, tokens=5)
    assert ids.shape == mask.shape == (0, 8)


def test_paragraphs_are_of_the_units_that_they_are_told_of() -> None:
    documents = tuple(f"{n} {_LONG}\n\n{_LONG} of {n}, and no other one" for n in range(30))
    units = Units.of(documents, 8)
    for unit, paragraph in drawn_paragraphs(units):
        assert any(paragraph in text for text in units.parts[unit])
