"""Pairs of texts: from the lines of a file, or made of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import TextSourceError
from exporter.models.texts.passages import drawn_pairs, pack_pairs, pairs_of
from exporter.models.texts.sources import TextSource, read_texts
from exporter.models.texts.tokenizer import tokenizer_in
from tests.raising import raises
from tests.text_graphs import WORDS
from tests.tiny_models import write_bert_tokenizer

CORPUS = [{"id": "a", "text": "A"}, {"id": "b", "text": "B"}]


def _read(folder: Path, lines: list[Any]) -> TextSource:
    path = folder / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return read_texts(str(path), part="calibration")


@pytest.mark.parametrize(
    ("lines", "pairs"),
    [
        ([{"query": "q", "passage": "p"}], [("q", "p")]),
        ([{"query": "q", "passages": ["p", "r"], "relevant": [0]}], [("q", "p"), ("q", "r")]),
        ([{"sentence1": "s", "sentence2": "t", "score": 1}], [("s", "t")]),
        ([*CORPUS, {"query": "q", "relevant": ["b"]}], [("q", "B"), ("q", "A")]),
        ([{"query": "q", "relevant": ["a"]}, *CORPUS], [("q", "A"), ("q", "B")]),
        (CORPUS, []),
        ([{"text": "t", "label": 1}], []),
        ([{"query": "a prompt alone"}], []),
    ],
)
def test_lines_of_tasks_are_pairs(tmp_path: Path, lines: list[Any], pairs: list[Any]) -> None:
    assert list(_read(tmp_path, lines).pairs) == pairs


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ({"query": "q", "passage": " "}, "passage"),
        ({"query": "q"}, "passage"),
        ({"passage": "p"}, "query"),
        ({"query": "q", "passages": []}, "passages"),
        ({"query": "q", "passages": ["p", 1]}, "passages[1]"),
    ],
)
def test_a_pair_of_one_side_names_its_line(tmp_path: Path, line: Any, field: str) -> None:
    with raises(TextSourceError, "one-sided", "line 2", field):
        _read(tmp_path, [{"query": "q", "passage": "p"}, line])


@pytest.mark.parametrize("relevant", [[], ["c"], "a", None])
def test_a_query_names_passages_that_are_there(tmp_path: Path, relevant: Any) -> None:
    result = [{"query": "q", "relevant": ["a"]}, {"query": "r", "relevant": relevant}]
    with raises(TextSourceError, "one-sided", "line 4"):
        _read(tmp_path, [*CORPUS, *result])


def test_other_models_read_both_sides_as_paragraphs(tmp_path: Path) -> None:
    source = _read(tmp_path, [{"query": "q", "passages": ["p", "r"]}])
    assert source.documents == ("q\n\np\n\nr",)
    other = _read(tmp_path, [{"query": "q", "passages": ["p", "s"]}])
    assert source.sha256 != other.sha256


def _text(number: int) -> TextSource:
    paragraphs = (
        f"Here is the first sentence of {word}. And then there follows all of the rest of {word}."
        for word in WORDS[:number]
    )
    return TextSource("made", ("\n\n".join(paragraphs),), "0" * 64)


def test_a_text_makes_pairs_that_belong_together_and_that_don_t() -> None:
    pairs = pairs_of(_text(5))
    belongs = [first.split()[-1] == rest.split()[-1] for first, rest in pairs]
    assert belongs == [True, False, False, True, True, False, False, True, True, False]
    for at in range(0, 10, 2):
        assert pairs[at][0] == pairs[at + 1][0]
    assert pairs_of(_text(1)) == []


def test_pairs_of_a_file_are_taken_as_they_are(tmp_path: Path) -> None:
    source = _read(tmp_path, [{"query": "q", "passage": "p"}])
    assert pairs_of(source) == [("q", "p")]


def test_what_stands_together_is_drawn_together() -> None:
    line = (
        "Here is sentence {} of {}. And then there follows all of the rest of what {} says of {}."
    )
    documents = tuple(
        "\n\n".join(line.format(n, word, n, word) for n in range(3)) for word in WORDS
    )
    source = TextSource("made", documents, "0" * 64)
    units = source.units(8)
    drawn = [*drawn_pairs(source, units)]
    assert len(drawn) == 2 * 3 * len(WORDS)
    for (unit, one), (again, other) in zip(drawn[::2], drawn[1::2], strict=True):
        assert unit == again
        assert one[0] == other[0]
        assert any(one[0] in text for text in units.parts[unit])


def test_packed_pairs_tell_which_text_a_token_is_of(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    write_bert_tokenizer(tmp_path)
    first, second = " ".join(WORDS[:2]), " ".join(WORDS[2:10])
    ids, mask, types, _ = pack_pairs(
        tokenizer_in(tmp_path / "tokenizer.json"),
        enumerate([(first, second), (first, first), (first, first)]),
        longest=8,
        tokens=9,
    )
    assert types is not None
    assert ids[0].tolist() == [21, 1, 2, 22, 3, 4, 5, 22]  # the longer text has lost its end
    assert ids[1][mask[1]].tolist() == [21, 1, 2, 22, 1, 2, 22]
    assert types[0].tolist() == [0] * 4 + [1] * 4
    assert types[1][mask[1]].tolist() == [0] * 4 + [1] * 3
