"""Texts beside a model: where the tokenizer is found, what ends a text, how it is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.engines.decoding.text_model import TextModel
from exporter.errors import BackendError
from tests.raising import raises

WORDS = ["Ġa", "Ġb", "c", "ã", "ģ", "Ĥ"]  # the last three are the bytes of one character


def tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer; the last three of its tokens make one character."""
    pytest.importorskip("tokenizers")
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                    "use_regex": True},
        "model": {"type": "BPE", "merges": [], "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {word: number for number, word in enumerate(WORDS)}},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content))
    return file


def test_a_character_is_written_when_it_is_whole(tmp_path: Path) -> None:
    pieces: list[str] = []
    texts = TextModel.of(tokenizer(tmp_path).parent)
    stream = texts.stream(pieces.append)
    result = []
    for token in (0, 3, 4, 5, 1):
        stream.add(token)
        result.append("".join(pieces))
    assert result == [" a", " a", " a", " aあ", " aあ b"]
    stream.finish((0, 3, 4, 5, 1))
    assert "".join(pieces) == texts.decode((0, 3, 4, 5, 1))


def test_a_text_that_breaks_off_within_a_character_is_written_all_the_same(tmp_path: Path) -> None:
    pieces: list[str] = []
    texts = TextModel.of(tokenizer(tmp_path).parent)
    stream = texts.stream(pieces.append)
    for token in (0, 3):
        stream.add(token)
    assert "".join(pieces) == " a"
    stream.finish((0, 3))
    assert "".join(pieces) == texts.decode((0, 3)) == " a\ufffd"


def test_a_tokenizer_elsewhere_brings_the_configs_that_are_missing(tmp_path: Path) -> None:
    file = tokenizer(tmp_path / "model")
    (file.parent / "config.json").write_text('{"n_positions": 7, "eos_token_id": 1}')
    (tmp_path / "engines").mkdir()
    for given in (file, file.parent):
        texts = TextModel.of(tmp_path / "engines", given)
        assert (texts.positions, texts.stop_ids) == (7, {1})
    (tmp_path / "engines" / "config.json").write_text('{"n_positions": 9}')
    assert TextModel.of(tmp_path / "engines", file).positions == 9


def test_a_missing_tokenizer_is_told(tmp_path: Path) -> None:
    with raises(BackendError, "no-tokenizer", tmp_path):
        TextModel.of(tmp_path)
    with raises(BackendError, "no-tokenizer", tmp_path / "nowhere"):
        TextModel.of(tmp_path, tmp_path / "nowhere")
    with raises(BackendError, "file-missing", tmp_path / "nowhere"):
        TextModel.of(tmp_path / "nowhere" / "model.onnx")


def test_a_prompt_is_neither_cut_nor_padded(tmp_path: Path) -> None:
    file = tokenizer(tmp_path)
    content = json.loads(file.read_text())
    content["truncation"] = {
        "max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "a",
    }  # fmt: skip
    file.write_text(json.dumps(content))
    assert TextModel.of(tmp_path).encode(" a b a b") == [0, 1, 0, 1]
