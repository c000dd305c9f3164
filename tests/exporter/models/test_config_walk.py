"""What a model says of itself, without anything that is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import UnsafeModelError
from exporter.models.families import FAMILIES, REVIEWED
from exporter.models.loading import checked_folder as config_walk
from exporter.models.loading.checked_folder import (
    Dangers,
    checked_config,
    files_as_they_are,
    refuse_changed,
)
from tests.architectures.catalogue import CATALOGUE
from tests.raising import raises

PATH = Path("config.json")


@pytest.mark.parametrize(
    "content",
    [
        {"trust_remote_code": True},
        {"backbone_kwargs": {"a": 1}},
        {"use_timm_backbone": True},
        {"use_pretrained_backbone": True},
        {"backbone": "a/b"},
        {"attn_implementation": "a/b"},
        {"_attn_implementation": {"text": "a/b@v1:f"}},
        {"experts_implementation": "a/b"},
        {"_attn_implementation_internal": "a/b"},
        {"configuration_files": ["config.4.0.0.json"]},
    ],
    ids=lambda content: next(iter(content)),
)
def test_dangerous_entries_are_found_at_any_depth(content: dict[str, Any]) -> None:
    for item in (content, {"a": content}, {"a": [0, {"b": [content]}]}):
        with pytest.raises(UnsafeModelError):
            config_walk.refuse_dangerous_entries(item, PATH)


@pytest.mark.parametrize(
    "content",
    [
        {"trust_remote_code": False, "use_timm_backbone": None, "backbone_kwargs": {}},
        {"backbone": None},
        {"backbone_config": {"model_type": "resnet"}},
        {"attn_implementation": "sdpa", "_attn_implementation": None, "cache_implementation": "x"},
        {"_attn_implementation_internal": "flash_attention_2"},
        {"_name_or_path": "owner/name", "transformers_version": "5.0.0"},
    ],
)
def test_harmless_entries_pass(content: dict[str, Any]) -> None:
    config_walk.refuse_dangerous_entries(content, PATH)


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "spm_file", "vocab", "merges"])
def test_a_tokenizers_files_are_found_by_their_usual_names(key: str) -> None:
    with pytest.raises(UnsafeModelError):
        config_walk.refuse_files_elsewhere({key: "vocab.txt"}, PATH)
    config_walk.refuse_files_elsewhere({key: None, "name_or_path": "/home/x"}, PATH)


def test_where_old_versions_kept_their_cache_is_never_opened() -> None:
    config_walk.refuse_files_elsewhere({"special_tokens_map_file": "/home/them/.cache/x"}, PATH)


def test_the_types_are_those_of_the_tables() -> None:
    """A type is on the list when it is built, exported and cut in the tests; no other is."""
    assert set(FAMILIES) | {row.type_name for row in CATALOGUE} == REVIEWED


@pytest.mark.parametrize(
    "name",
    ["encoder-decoder", "rag", "detr", "timm_wrapper", "timm_backbone", "vision-encoder-decoder"],
)
def test_models_that_load_others_are_not_among_them(name: str) -> None:
    assert name not in REVIEWED


def _folder(path: Path, **config: Any) -> Path:
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return path


def test_a_type_is_refused_at_any_depth_unless_it_is_asked_for(tmp_path: Path) -> None:
    folder = _folder(tmp_path, parts=[{"model_type": "rag"}])
    with pytest.raises(UnsafeModelError):
        checked_config(folder, Dangers())
    checked_config(folder, Dangers(allow_any_model_type=True))


def test_leave_for_a_type_is_no_leave_for_anything_else(tmp_path: Path) -> None:
    folder = _folder(tmp_path, model_type="detr", backbone="a/b")
    with pytest.raises(UnsafeModelError):
        checked_config(folder, Dangers(True, True, True))


def test_code_of_the_folder_itself_may_be_trusted(tmp_path: Path) -> None:
    folder = _folder(tmp_path, model_type="own", auto_map={"AutoConfig": "code.C"})
    checked_config(folder, Dangers(trust_remote_code=True))
    folder = _folder(tmp_path, model_type="own", auto_map={"AutoConfig": "a/b--code.C"})
    with pytest.raises(UnsafeModelError):
        checked_config(folder, Dangers(trust_remote_code=True))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_changes_is_seen(tmp_path: Path, name: str) -> None:
    before = files_as_they_are(_folder(tmp_path))
    refuse_changed(tmp_path, before)
    (tmp_path / name).write_text("{}")
    with raises(UnsafeModelError, "file-changed", name):
        refuse_changed(tmp_path, before)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 5_000), ("bad_words_ids", [[1, 2]] * 70_000)]
)
def test_what_no_model_has_is_refused_in_every_config(
    tmp_path: Path, name: str, key: str, value: Any
) -> None:
    folder = _folder(tmp_path)
    (folder / name).write_text(json.dumps({"model_type": "llama", key: value}))
    with raises(UnsafeModelError, "", folder / name, key):
        checked_config(folder, Dangers())
