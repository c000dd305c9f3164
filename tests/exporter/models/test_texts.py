"""Texts: read, kept apart, cut into samples, pairs and paragraphs, mixed."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import sys
import sysconfig
import types
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import CalibrationRef
from exporter.errors import ComparisonError, MissingDependencyError, TextSourceError
from exporter.models.texts import sources
from exporter.models.texts.calibration import (
    CalibrationText,
    joined,
    samples_of,
    seed_of_all,
    specs_of,
)
from exporter.models.texts.documents import Content, Units
from exporter.models.texts.passages import (
    drawn_pairs,
    first_rows,
    pack_tokens,
    pairs_of,
    paragraphs,
    sampled,
)
from exporter.models.texts.sources import TextSource, read_texts, refuse_same_text
from exporter.models.texts.tokenizer import TextTokenizer, tokenizer_in
from tests.raising import raises
from tests.text_graphs import WORDS
from tests.tiny_models import write_bert_tokenizer


def encode_words(text: str) -> list[int]:
    return [len(word) for word in text.split()]


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
        (b'{"text": "ok"}\n{"text": ', "bad-line", (2,)),
        (b'{"text": "ok"}\n[1]\n', "bad-line", (2,)),
        (b'{"text": 3}\n', "bad-line", (1, "text")),
        (b'{"text": null}\n', "bad-line", (1, "text")),
        (b'{"n": 3}\n', "bad-line", (1,)),
        (b'{"text": "ok"}\n{"text": "\\ud800"}\n', "bad-line", (2,)),
        (b"\n\n", "no-text", ()),
        (b'{"text": "  "}\n', "no-text", ()),
        (b'{"text": "\xff"}\n', "unreadable", ()),
    ],
)
def test_bad_jsonl_is_refused_by_line(
    tmp_path: Path, content: bytes, code: str, named: tuple[object, ...]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with raises(TextSourceError, code, path, *named):
        read_texts(str(path), part="calibration")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A few modules stand for Python's library, which takes a quarter of a minute to read."""
    whole = Path(sysconfig.get_path("stdlib"))
    for name in ("asyncio", "email", "pathlib.py"):
        copy = shutil.copytree if (whole / name).is_dir() else shutil.copy
        copy(whole / name, tmp_path / name)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    for cached in (sources.docstrings, sources._halves):
        cached.cache_clear()
    yield
    for cached in (sources.docstrings, sources._halves):
        cached.cache_clear()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("spec", ["pydoc", "docstrings"])
def test_halves_share_no_paragraph_and_are_the_same_each_time(spec: str) -> None:
    first, second = (read_texts(spec, part=part) for part in ("calibration", "evaluation"))
    assert first == read_texts(spec, part="calibration")
    assert first.source.startswith(f"{spec} (calibration half")
    assert first.sha256 != second.sha256
    assert not long_paragraphs(first) & long_paragraphs(second)
    for half in (first, second):
        assert sum(map(len, half.documents)) > 30_000
    if spec == "docstrings":
        assert str.__doc__ not in first.documents  # there is no source of it
        assert Path.__doc__ is not None
        whole = {inspect.cleandoc(document) for document in (*first.documents, *second.documents)}
        assert inspect.cleandoc(Path.__doc__) in whole
        assert min(map(len, whole)) > 60


def long_paragraphs(texts: TextSource) -> set[str]:
    pieces = (" ".join(p.split()) for doc in texts.documents for p in doc.split("\n\n"))
    return {piece for piece in pieces if len(piece) >= 60}


WIKI = " = One = \n\n The first . \n\n = = Part = = \n\n More . \n\n = Two = \n\n The second . \n"
MARKDOWN = "# One\n\nThe first.\n\n## Part\n\nMore.\n\n# Two\n\nThe second.\n"
CODE = "# a comment, naïve\nx = 1\n\n# another\ny = 2\n"


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
    assert texts.source == str(path)
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


def test_hub_data_sets_are_read_by_their_parts_split(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_datasets([{"text": "one"}, {"text": ""}, {"text": "two"}], ["train", "test"])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    texts = read_texts("hf:wiki:raw", part="evaluation")
    assert texts.documents == ("one", "two")
    assert texts.source == "hf:wiki:raw:test:text"
    read_texts("hf:wiki", part="calibration")
    assert fake.calls == [("wiki", "raw", "test"), ("wiki", None, "train")]
    rows = [{"text": line} for line in WIKI.splitlines(keepends=True)]
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(rows, ["test"]))
    first, second = read_texts("hf:wiki", part="evaluation").documents
    assert (first.split()[1], second.split()[1]) == ("One", "Two")
    assert "More ." in first


def test_a_folder_is_read_with_all_its_texts_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.md").write_text("of b")
    (tmp_path / "a.jsonl").write_text('{"text": "of a"}\n{"text": "of b"}\n{"text": "of a"}\n')
    (tmp_path / "c.png").write_bytes(b"\x89")
    (tmp_path / "d.txt").symlink_to("/etc/hostname")
    assert read_texts(str(tmp_path), part="calibration").documents == ("of a", "of b")

    batch = types.SimpleNamespace(
        to_pylist=lambda: [{"id": "1", "body": "of e"}, {"id": "2", "body": "of a"}]
    )
    file = types.SimpleNamespace(iter_batches=lambda: [batch])
    fake = types.SimpleNamespace(ParquetFile=lambda _: file)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", fake)
    (tmp_path / "e.parquet").touch()
    assert read_texts(str(tmp_path), part="evaluation").documents == ("of a", "of b", "of e")
    assert read_texts(str(tmp_path / "e.parquet"), part="evaluation").documents == ("of e", "of a")


def test_a_folder_without_texts_and_a_broken_table_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raises(TextSourceError, "no-text", str(tmp_path)):
        read_texts(str(tmp_path), part="calibration")

    def broken(*_: Any) -> Any:
        raise ValueError("not a Parquet file")

    fake = types.SimpleNamespace(ParquetFile=broken)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", fake)
    with raises(TextSourceError, "unreadable", "e.parquet"):
        read_texts(str(tmp_path / "e.parquet"), part="calibration")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError):
        read_texts(str(tmp_path / "e.parquet"), part="calibration")


def test_hub_errors_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets([{"body": "x"}], ["train"]))
    with raises(TextSourceError, "no-such-data", "test", "validation", "train"):
        read_texts("hf:wiki", part="evaluation")
    with raises(TextSourceError, "no-such-data", "'txt'"):
        read_texts("hf:wiki::train:txt", part="evaluation")
    with raises(TextSourceError, "no-such-data"):
        read_texts("hf:", part="evaluation")
    monkeypatch.setitem(sys.modules, "datasets", None)
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


def test_a_text_is_as_many_units_as_it_has_parts() -> None:
    copy = STORIES[3].splitlines()[0] + "\n\n" + story("other")
    units = Units.of((*STORIES, copy), 16)
    (both,) = (unit for unit in units.parts if copy in unit)
    assert STORIES[3] in both
    left = units.apart_from(units.keys([range(3)]))
    assert [not unit for unit in left.parts] == [n < 3 for n in range(len(units.parts))]
    other_length = Units.of((*STORIES, copy), 40).apart_from(units.keys([range(3)]))
    gone = {text for unit in units.parts[:3] for text in unit}
    assert not gone & {text for unit in other_length.parts for text in unit}
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


_LONG = "a paragraph of more than forty characters, surely"


def _source(*documents: str) -> TextSource:
    return TextSource("made", documents, "0" * 64)


def _encode(text: str, special: bool) -> list[int]:
    """A token a word: its length; 101 before and 102 behind."""
    ids = [len(word) for word in text.split()]
    return [101, *ids, 102] if special else ids


TOKENIZER = TextTokenizer(_encode)


def _packed(*documents: str, longest: int, tokens: int) -> CalibrationText:
    source, units = _source(*documents), Units.of(documents, longest)
    return sampled("paragraphs", TOKENIZER, source, units, tokens=tokens, longest=longest)


def test_short_lines_are_paragraphs_where_there_are_no_others() -> None:
    source = _source(f"Heading\n\n{_LONG}\n \n{_LONG}\n\n{_LONG}\nand a second line", "\n\n")
    assert paragraphs(source) == [_LONG, f"{_LONG} and a second line"]
    assert paragraphs(_source("how to sort\n\nhow to sort\n\nlist")) == ["how to sort", "list"]


@pytest.mark.parametrize(
    ("text", "longest", "tokens", "rows"),
    [
        ("a bb ccc\n\ndddd", 6, 100, [[101, 1, 2, 3, 102], [101, 4, 102]]),
        ("a bb ccc dddd e", 4, 100, [[101, 1, 2, 102], [101, 3, 4, 102], [101, 1, 102]]),
        ("a bb\n\nccc dddd\n\ne", 8, 5, [[101, 1, 2, 102], [101, 3, 4, 102]]),
        ("a bb\n\nccc dddd\n\ne", 8, 4, [[101, 1, 2, 102]]),  # no more than is wanted
        (" ", 8, 5, []),
    ],
)
def test_each_paragraph_is_a_padded_sample_with_the_tokenizers_ends(
    text: str, longest: int, tokens: int, rows: list[list[int]]
) -> None:
    packed = _packed(text, longest=longest, tokens=tokens)
    ids, mask = packed.input_ids, packed.mask
    assert [row[own].tolist() for row, own in zip(ids, mask, strict=True)] == rows
    assert ids.shape == mask.shape == (len(rows), longest)
    assert (ids.dtype, packed.types) == (np.int64, None)
    assert packed.documents.tolist() == [0] * len(rows)


def _mixed(name: str, samples: int, first: int = 0) -> CalibrationText:
    ids = np.arange(first, first + samples * 4, dtype=np.int64).reshape(samples, 4)
    ref = CalibrationRef(
        source=name, samples=samples, sequence_length=4, tokens=4 * samples, sha256=name * 64,
        documents=f"0-{samples - 1}",
    )  # fmt: skip
    return CalibrationText(ref, ids, np.ones_like(ids, dtype=np.bool_))


def test_a_mixture_comes_apart_into_its_texts() -> None:
    texts = [_mixed("a", 6), _mixed("b", 6, first=100), _mixed("c", 3, first=200)]
    mixture = joined(texts)
    assert [one.ref for one in mixture.apart] == [text.ref for text in texts]
    for one, text in zip(mixture.apart, texts, strict=True):
        np.testing.assert_array_equal(one.input_ids, text.input_ids)
    assert mixture.parts == [text.part for text in texts]
    assert mixture.part.ids_sha256 not in {part.ids_sha256 for part in mixture.parts}
    assert mixture.part.mixture == mixture.parts
    part = joined([_mixed("a", 2), _mixed("b", 2, first=100)]).rows(slice(0, 1))
    assert [ref.source for ref in part.parts] == ["a"]
    assert [ref.source for ref in part.ref.mixture] == ["a", "b"]
    text = _mixed("a", 2)
    assert joined([text]) is text
    assert text.parts == [text.part]
    assert text.ref.mixture == []
    assert text.ref.texts == [text.ref]
    assert text.part.ids_sha256 == text.ids_sha256
    assert text.part.model_copy(update={"ids_sha256": None}) == text.ref


@pytest.mark.parametrize("chosen", [slice(0, 6), slice(2, 8), slice(0, None, 2)])
def test_every_part_of_a_mixture_has_alike_much_of_each(chosen: slice) -> None:
    part = joined([_mixed("a", 6), _mixed("b", 6, first=100)]).rows(chosen)
    assert [ref.samples for ref in part.parts] == [3, 3]
    assert [ref.tokens for ref in part.parts] == [12, 12]
    assert part.ref.samples == 6
    assert [ref.samples for ref in part.ref.texts] == [3, 3]


def test_a_mixture_is_read_again_by_the_names_of_its_texts() -> None:
    names = [
        "pydoc (calibration half, Python 3.11)",
        "self (text sampled by the model, seed 3)",
        "a",
    ]
    texts = [_mixed(name, samples) for name, samples in zip(names, (6, 6, 2), strict=True)]
    ref = joined(texts).ref
    assert (specs_of(ref), samples_of(ref), seed_of_all(ref)) == (("pydoc", "self", "a"), 6, 3)
    ref = texts[2].ref
    assert (specs_of(ref), samples_of(ref), seed_of_all(ref)) == (("a",), 2, 0)
    ref = ref.model_copy(update={"samples": 0})  # of scores that read no text
    assert (specs_of(ref), samples_of(ref), seed_of_all(ref)) == ((), None, 0)


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
    source = _read(tmp_path, lines)
    assert list(source.pairs) == pairs
    assert not pairs or pairs_of(source) == pairs


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ({"query": "q", "passage": " "}, "passage"),
        ({"query": "q"}, "passage"),
        ({"passage": "p"}, "query"),
        ({"query": "q", "passages": []}, "passages"),
        ({"query": "q", "passages": ["p", 1]}, "passages[1]"),
        *[({"query": "r", "relevant": relevant}, "") for relevant in ([], ["c"], "a", None)],
    ],
)
def test_a_pair_of_one_side_names_its_line(tmp_path: Path, line: Any, field: str) -> None:
    before = (
        [{"query": "q", "passage": "p"}] if field else [*CORPUS, {"query": "q", "relevant": ["a"]}]
    )
    with raises(TextSourceError, "bad-line", f"line {len(before) + 1}", field):
        _read(tmp_path, [*before, line])


def test_other_models_read_both_sides_as_paragraphs(tmp_path: Path) -> None:
    source = _read(tmp_path, [{"query": "q", "passages": ["p", "r"]}])
    assert source.documents == ("q\n\np\n\nr",)
    other = _read(tmp_path, [{"query": "q", "passages": ["p", "s"]}])
    assert source.sha256 != other.sha256


def _sentences(number: int) -> TextSource:
    paragraphs = (
        f"Here is the first sentence of {word}. And then there follows all of the rest of {word}."
        for word in WORDS[:number]
    )
    return TextSource("made", ("\n\n".join(paragraphs),), "0" * 64)


def test_a_text_makes_pairs_that_belong_together_and_that_don_t() -> None:
    pairs = pairs_of(_sentences(5))
    belongs = [first.split()[-1] == rest.split()[-1] for first, rest in pairs]
    assert belongs == [True, False, False, True, True, False, False, True, True, False]
    for at in range(0, 10, 2):
        assert pairs[at][0] == pairs[at + 1][0]
    assert pairs_of(_sentences(1)) == []


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
    pair = tokenizer_in(tmp_path / "tokenizer.json").pair
    rows = [(n, *pair(first, other, 8)) for n, other in enumerate([second, first, first])]
    packed = first_rows(_source(first), rows, tokens=9, longest=8)
    ids, mask, types = packed.input_ids, packed.mask, packed.types
    assert types is not None
    assert ids[0].tolist() == [21, 1, 2, 22, 3, 4, 5, 22]  # the longer text has lost its end
    assert ids[1][mask[1]].tolist() == [21, 1, 2, 22, 1, 2, 22]
    assert types[0].tolist() == [0] * 4 + [1] * 4
    assert types[1][mask[1]].tolist() == [0] * 4 + [1] * 3
