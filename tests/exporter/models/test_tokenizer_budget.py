"""A tokenizer of a stranger's: expressions that never end, replacements without end."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from exporter.engines.decoding.text_model import TextModel
from exporter.errors import ComparisonError, UnsafeInputError
from exporter.models.texts.tokenizer import read_tokenizer, tokenizer_in
from exporter.models.tokenizer_budget import refuse_growing
from tests.raising import raises

pytest.importorskip("tokenizers")


def replaced(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": steps}


def split(pattern: str) -> dict[str, Any]:
    how = {"behavior": "Isolated", "invert": False}
    return {"type": "Split", "pattern": {"Regex": pattern}, **how}


def written(folder: Path, **parts: Any) -> Path:
    names = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    words = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1, "b": 2}, "unk_token": "[UNK]"}
    result = {"version": "1.0", "added_tokens": [], "model": words, **dict.fromkeys(names), **parts}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(result))
    return path


def precompiled(longest: int) -> dict[str, Any]:
    """A map of characters as SentencePiece writes it, with an empty tree."""
    charsmap = (4).to_bytes(4, "little") + bytes(4) + b"x" * longest + b"\0a\0"
    return {"type": "Precompiled", "precompiled_charsmap": b64encode(charsmap).decode()}


@pytest.mark.parametrize(
    "normalizer",
    [
        precompiled(1_000),
        sequence(*[replaced("a", "a" * 50)] * 6),
        sequence(*[replaced("", "ab", "Regex")] * 9),
        {"type": "Prepend", "prepend": "a" * 1_000},
    ],
)
def test_what_makes_a_text_endless_is_refused_before_it_is_loaded(
    tmp_path: Path, normalizer: dict[str, Any]
) -> None:
    token = {"id": 1, "content": "a", "single_word": False, "lstrip": False, "rstrip": False}
    added = [{**token, "normalized": True, "special": False}]
    path = written(tmp_path, normalizer=normalizer, added_tokens=added)
    with raises(ComparisonError, "broken-tokenizer", path, 256):
        read_tokenizer(path)


def test_a_name_that_is_escaped_is_read(tmp_path: Path) -> None:
    decoder = {"type": "Sequence", "decoders": [replaced("a", "a" * 50)] * 6}
    path = written(tmp_path, decoder=decoder)
    path.write_text(path.read_text().replace("Replace", "Repl\\u0061ce"))
    with raises(ComparisonError, "broken-tokenizer", path, 256):
        read_tokenizer(path)


def test_a_file_of_nothing_but_lists_is_refused_before_it_takes_gigabytes(tmp_path: Path) -> None:
    path = written(tmp_path, normalizer=replaced("a", "b"), more=[0])
    path.write_text(path.read_text().replace("[0]", "[" + "[]," * (1 << 24) + "0]"))
    with raises(UnsafeInputError, "too-many-values", path):
        read_tokenizer(path)


def test_a_long_text_may_not_grow_as_a_short_one_may(tmp_path: Path) -> None:
    path = written(tmp_path, normalizer=replaced("b", "b" * 100))
    encode = tokenizer_in(path).encode
    assert encode("a", False) == [1]
    with raises(ComparisonError, "broken-tokenizer", path, "400,000"):
        encode("a" * 400_000, False)


def test_what_other_tokenizers_do_passes(tmp_path: Path) -> None:
    llama = sequence({"type": "Prepend", "prepend": "_"}, replaced(" ", "_"))
    decoder = [replaced("_", " "), {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    path = written(tmp_path, normalizer=precompiled(33))
    refuse_growing(path.read_bytes(), str(path))
    path = written(tmp_path, normalizer=llama, decoder={"type": "Sequence", "decoders": decoder})
    assert tokenizer_in(path).encode("a", False) == [0]


@pytest.mark.parametrize(
    ("pattern", "text"), [("(a+)+$", "a" * 40 + "b"), (r"[\s\S]*(?<=Q)", "ab" * 10_000)]
)
def test_an_expression_that_goes_back_for_ever_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, text: str
) -> None:
    monkeypatch.setattr("exporter.models.tokenizer_budget._SECONDS", 0.5)
    monkeypatch.setattr("exporter.models.tokenizer_budget._CHARACTERS_A_SECOND", 1e9)
    path = written(tmp_path, pre_tokenizer=split(pattern))
    (tmp_path / "config.json").write_text("{}")
    pair = tokenizer_in(path).encode_pair
    assert pair is not None
    for encode in (
        lambda: TextModel.of(tmp_path).encode(text),
        lambda: tokenizer_in(path).encode(text, True),
        lambda: pair(text, text, 100),
    ):
        with raises(ComparisonError, "broken-tokenizer", path):
            encode()
