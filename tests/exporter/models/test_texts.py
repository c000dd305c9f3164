"""Reading texts, keeping calibration and evaluation apart, packing tokens."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import CalibrationRef
from exporter.errors import ComparisonError, MissingDependencyError, TextSourceError
from exporter.models.texts.documents import Content, Units
from exporter.models.texts.passages import pack_tokens
from exporter.models.texts.sources import TextSource, read_texts, refuse_same_text
from tests.raising import raises


def encode_words(text: str) -> list[int]:
    return [len(word) for word in text.split()]


def test_text_file_is_one_document_with_the_digest_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("One.\n\nTwo: naïve.\n".encode())
    texts = read_texts(str(path), part="evaluation")
    assert texts.documents == ("One.\n\nTwo: naïve.\n",)
    assert texts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert texts.source == str(path)


def test_jsonl_takes_text_else_the_longest_string(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "a", "other": "longer"}, {"id": "x", "body": "the body\u2028goes on"}]
    path.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", "utf-8"
    )
    assert read_texts(str(path), part="calibration").documents == ("a", "the body\u2028goes on")


@pytest.mark.parametrize(
    ("content", "code", "named"),
    [
        (b'{"text": "ok"}\n{"text": ', "not-json", (2,)),
        (b'{"text": "ok"}\n[1]\n', "not-an-object", (2,)),
        (b'{"text": 3}\n', "not-a-string", (1, "text")),
        (b'{"text": null}\n', "not-a-string", (1, "text")),
        (b'{"n": 3}\n', "no-string", (1,)),
        (b'{"text": "ok"}\n{"text": "\\ud800"}\n', "not-json", (2,)),
        (b"\n\n", "no-text", ()),
        (b'{"text": "  "}\n', "no-text", ()),
        (b'{"text": "\xff"}\n', "not-utf-8", ()),
    ],
)
def test_bad_jsonl_is_refused_by_line(
    tmp_path: Path, content: bytes, code: str, named: tuple[object, ...]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with raises(TextSourceError, code, path, *named):
        read_texts(str(path), part="calibration")


def test_the_halves_of_docstrings_are_much_text_and_hold_what_has_a_source() -> None:
    first, second = (read_texts("docstrings", part=part) for part in ("calibration", "evaluation"))
    assert first.source.startswith("docstrings (calibration half")
    assert str.__doc__ not in first.documents  # there is no source of it
    assert Path.__doc__ is not None
    whole = {inspect.cleandoc(document) for document in (*first.documents, *second.documents)}
    assert inspect.cleandoc(Path.__doc__) in whole
    assert min(map(len, whole)) > 60
    pydoc = read_texts("pydoc", part="calibration")
    assert sum(map(len, first.documents)) > 2 * sum(map(len, pydoc.documents))


@pytest.mark.parametrize("spec", ["pydoc", "docstrings"])
def test_halves_share_no_paragraph_and_are_the_same_each_time(spec: str) -> None:
    first, second = (read_texts(spec, part=part) for part in ("calibration", "evaluation"))
    assert first == read_texts(spec, part="calibration")
    assert first.sha256 != second.sha256
    assert not long_paragraphs(first) & long_paragraphs(second)
    for half in (first, second):
        assert sum(map(len, half.documents)) > 100_000


def long_paragraphs(texts: TextSource) -> set[str]:
    pieces = (" ".join(p.split()) for doc in texts.documents for p in doc.split("\n\n"))
    return {piece for piece in pieces if len(piece) >= 60}


WIKI = " = One = \n\n The first . \n\n = = Part = = \n\n More . \n\n = Two = \n\n The second . \n"
MARKDOWN = "# One\n\nThe first.\n\n## Part\n\nMore.\n\n# Two\n\nThe second.\n"
CODE = "# a comment\nx = 1\n\n# another\ny = 2\n"


@pytest.mark.parametrize(
    ("text", "starts"),
    [(WIKI, [" = One", " = Two"]), (WIKI.replace("\n", "\r\n"), [" = One", " = Two"]),
     (MARKDOWN, ["# One", "# Two"]),
     (MARKDOWN.replace("\n", "\r\n"), ["# One", "# Two"]), (CODE, ["# a comment"]),
     ("before\n" + WIKI, ["bef", " = Two"])],
)  # fmt: skip
def test_a_file_of_several_articles_is_as_many_documents(
    tmp_path: Path, text: str, starts: list[str]
) -> None:
    path = tmp_path / "articles.txt"
    path.write_bytes(text.encode())
    texts = read_texts(str(path), part="evaluation")
    assert "".join(texts.documents) == text
    assert [doc[: len(start)] for doc, start in zip(texts.documents, starts, strict=True)] == starts
    assert texts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def fake_datasets(rows: list[dict[str, Any]], splits: list[str]) -> types.SimpleNamespace:
    calls: list[tuple[str, str | None, str]] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        calls.append((name, config, split))
        assert streaming
        return iter(rows)

    def split_names(name: str, config: str | None) -> list[str]:
        return splits

    return types.SimpleNamespace(
        load_dataset=load, get_dataset_split_names=split_names, calls=calls
    )


def test_hub_data_set_uses_the_split_of_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_datasets([{"text": "one"}, {"text": ""}, {"text": "two"}], ["train", "test"])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    texts = read_texts("hf:wiki:raw", part="evaluation")
    assert texts.documents == ("one", "two")
    assert texts.source == "hf:wiki:raw:test:text"
    read_texts("hf:wiki", part="calibration")
    assert fake.calls == [("wiki", "raw", "test"), ("wiki", None, "train")]


def test_lines_of_a_hub_data_set_of_wikitext_are_articles(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": line} for line in WIKI.splitlines(keepends=True)]
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(rows, ["test"]))
    first, second = read_texts("hf:wiki", part="evaluation").documents
    assert (first.split()[1], second.split()[1]) == ("One", "Two")
    assert "More ." in first


def test_hub_errors_name_split_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets([{"body": "x"}], ["train"]))
    with raises(TextSourceError, "split-missing", "test", "validation", "train"):
        read_texts("hf:wiki", part="evaluation")
    with raises(TextSourceError, "column-missing", "'txt'"):
        read_texts("hf:wiki::train:txt", part="evaluation")
    with raises(TextSourceError, "no-data-set"):
        read_texts("hf:", part="evaluation")


def test_hub_needs_consent_and_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with raises(TextSourceError, "needs-network", "hf:wiki"):
        read_texts("hf:wiki", part="evaluation", allow_network=False)
    with pytest.raises(MissingDependencyError) as caught:
        read_texts("hf:wiki", part="evaluation")
    assert "depthcut[datasets]" in (caught.value.hint or "")


def units_of(*documents: str, length: int) -> Units:
    return Units.of(documents, length)


def test_packing_joins_short_documents_and_leaves_the_tail_out() -> None:
    one, other = units_of("a bb ccc", "dddd e", length=2), units_of("dddd e", "a bb ccc", length=2)
    packed, documents = pack_tokens(encode_words, one, sequence_length=2, separator_id=0)
    assert packed.dtype == np.int64
    assert sorted(packed.tolist()) == [[1, 2], [3, 0], [4, 1]]
    assert documents.tolist() == [0, 0, 0]
    again = pack_tokens(encode_words, other, sequence_length=2, separator_id=0).ids
    assert {*map(tuple, again.tolist())} <= {(1, 2), (3, 0), (4, 1), (4, 1), (0, 1), (2, 3)}


def story(name: str, lines: int = 40) -> str:
    return "\n\n".join(
        f"{name} line {n} " + " ".join(f"{name}{n}w{m}" for m in range(12)) for n in range(lines)
    )


def word_ids(text: str) -> list[int]:
    return [int.from_bytes(word.encode()[:7], "big") for word in text.split()]


STORIES = tuple(story(f"s{n}") for n in range(20))


@pytest.mark.parametrize("by_size", [False, True])
def test_the_first_samples_are_the_same_however_many_are_drawn(by_size: bool) -> None:
    units = Units.of(STORIES, 16)
    few, many = (
        pack_tokens(word_ids, units, sequence_length=16, max_samples=n, by_size=by_size)
        for n in (30, 200)
    )
    assert (few.ids == many.ids[:30]).all()
    assert (few.documents == many.documents[:30]).all()
    assert len({tuple(row) for row in many.ids.tolist()}) == 200


@pytest.mark.parametrize("by_size", [False, True])
def test_samples_come_from_all_over_a_text(by_size: bool) -> None:
    """The first sixteen windows of a file are of one article or two."""
    units = Units.of(["\n".join(STORIES)], 16)
    assert units.are_stretches
    drawn = pack_tokens(word_ids, units, sequence_length=16, max_samples=16, by_size=by_size)
    stories = {number: {*word_ids(text)} for number, text in enumerate(STORIES)}
    of = [next(n for n, ids in stories.items() if row[3] in ids) for row in drawn.ids.tolist()]
    assert max(of) - min(of) >= 12
    assert len(set(of)) >= 5


def test_a_unit_is_left_out_with_all_that_shares_a_paragraph_with_it() -> None:
    copy = STORIES[3].splitlines()[0] + "\n\n" + story("other")
    units = Units.of((*STORIES, copy), 16)
    (both,) = (unit for unit in units.parts if copy in unit)
    assert STORIES[3] in both
    left = units.apart_from(units.keys([range(3)]))
    assert [not unit for unit in left.parts] == [n < 3 for n in range(len(units.parts))]
    other_length = Units.of((*STORIES, copy), 40).apart_from(units.keys([range(3)]))
    gone = {text for unit in units.parts[:3] for text in unit}
    assert not gone & {text for unit in other_length.parts for text in unit}


def test_stretches_of_one_document_have_gaps_between_them() -> None:
    document = story("one", 400)
    units = Units.of([document], 16)
    assert units.are_stretches
    assert len(units.parts) >= 8
    kept = sum(len(text) for unit in units.parts for text in unit)
    assert 0.85 * len(document) < kept < 0.95 * len(document)
    assert all(text in document for unit in units.parts for text in unit)


@pytest.mark.parametrize("text", [story("x", 2), "\n\n".join([story("x", 2)] * 50)])
def test_a_text_that_is_short_or_repeats_itself_is_one_unit(text: str) -> None:
    assert len(Units.of([text], 16).parts) == 1


def test_of_a_book_no_more_is_tokenised_than_is_needed() -> None:
    document = "".join(f"line {number}\n\n" for number in range(60_000))
    pieces: list[str] = []

    def encode(text: str) -> list[int]:
        pieces.append(text)
        return [0] * len(text)

    units = Units.of([document], 64)
    pack_tokens(encode, units, sequence_length=64, max_samples=4)
    assert 0 < sum(map(len, pieces)) < len(document) / 10
    pieces.clear()
    pack_tokens(encode, units, sequence_length=64)
    assert sorted("".join(pieces)) == sorted("".join(text for unit in units.parts for text in unit))


PARAGRAPHS = [paragraph for text in STORIES for paragraph in text.split("\n\n")]
OTHERS = story("other", 800).split("\n\n")


@pytest.mark.parametrize(
    ("documents", "shared"),
    [
        (["\n\n".join(PARAGRAPHS)], True),
        (["\n\n".join(PARAGRAPHS[::-1])], True),
        (["\r\n\r\n".join(PARAGRAPHS)], True),
        (["\n\n".join(PARAGRAPHS[100:220])], True),
        (["\n\n".join([*OTHERS, *PARAGRAPHS])], True),
        (["\n\n".join([*OTHERS, *PARAGRAPHS[:8]])], False),
        (["\n\n".join(OTHERS)], False),
    ],
    ids=["one document", "reordered", "line ends", "a part", "a part of it", "a little", "other"],
)
def test_a_copy_is_known_by_what_it_holds(documents: list[str], shared: bool) -> None:
    judged = TextSource("copy.txt", tuple(documents), "1" * 64)
    whole = Content.of(STORIES)
    ref = CalibrationRef(
        source="first.txt", samples=1, sequence_length=8, tokens=8, sha256="0" * 64,
        content=whole.written(),
    )  # fmt: skip
    with raises(ComparisonError, "same-text", "first.txt") if shared else nullcontext():
        refuse_same_text(judged, [ref], "what chose")
    assert len(ref.content) < 400
    assert judged.content.is_shared(whole) is shared
    assert Content.of([]).is_shared(whole) is False
    assert Content.read("no base 64!").is_shared(whole) is False


def test_a_paragraph_that_all_documents_have_ties_none_of_them() -> None:
    """A licence at the head of each; copies are of one unit all the same."""
    licence = "Permission is hereby granted, free of charge, to any person obtaining a copy."
    own = [f"Document {n} tells of its own subject and of nothing else. " * 20 for n in range(40)]
    units = Units.of([f"{licence}\n\n{text}" for text in [*own, own[3]]], 32)
    assert len(units.parts) == 40
    assert len(units.apart_from(units.keys([range(4)])).parts) == 40
    kept = [unit for unit in units.apart_from(units.keys([range(4)])).parts if unit]
    assert len(kept) == 36
    assert sorted(map(len, units.parts))[-1] == 2
