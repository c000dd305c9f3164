"""What a stranger's files may say: configs, templates, tokenizers, numbers."""

from __future__ import annotations

import contextlib
import json
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.cut.gguf_layers import place_in_layer
from exporter.engines.decoding.text_model import TextModel
from exporter.errors import (
    BackendError,
    CalibrationError,
    ComparisonError,
    GgufFileError,
    UnsafeInputError,
    UnsafeModelError,
)
from exporter.heal.options import HealOptions
from exporter.heal.texts import _default_texts
from exporter.models.families import FAMILIES, REVIEWED
from exporter.models.graph_facts import CACHE_INPUT
from exporter.models.loading import checked_folder as config_walk
from exporter.models.loading.checked_folder import (
    Dangers,
    checked_config,
    files_as_they_are,
    refuse_changed,
)
from exporter.models.loading.sources import resolve_source
from exporter.models.model_folder import ModelFolder
from exporter.models.texts.calibration import seed_of
from exporter.models.texts.chat_template import ChatTemplate
from exporter.models.texts.self_text import chat_prefix
from exporter.models.texts.tokenizer import read_tokenizer, tokenizer_in
from exporter.models.tokenizer_budget import refuse_growing
from graph_passes.types import MOST_LAYERS, number_in
from tests.architectures.catalogue import CATALOGUE
from tests.raising import raises
from tests.text_graphs import write_tokenizer
from tests.tiny_gguf import TinyGguf
from tests.tiny_models import tiny_loaded, tiny_tokenizer

pytest.importorskip("tokenizers")


PATH = Path("config.json")


@pytest.mark.parametrize(
    ("content", "dangerous"),
    [
        ({"trust_remote_code": True}, True),
        ({"backbone_kwargs": {"a": 1}}, True),
        ({"use_timm_backbone": True}, True),
        ({"use_pretrained_backbone": True}, True),
        ({"backbone": "a/b"}, True),
        ({"attn_implementation": "a/b"}, True),
        ({"_attn_implementation": {"text": "a/b@v1:f"}}, True),
        ({"experts_implementation": "a/b"}, True),
        ({"_attn_implementation_internal": "a/b"}, True),
        ({"configuration_files": ["config.4.0.0.json"]}, True),
        ({"trust_remote_code": False, "use_timm_backbone": None, "backbone_kwargs": {}}, False),
        ({"backbone": None}, False),
        ({"backbone_config": {"model_type": "resnet"}}, False),
        ({"attn_implementation": "sdpa", "_attn_implementation": None}, False),
        ({"_attn_implementation_internal": "flash_attention_2", "cache_implementation": "x"},
         False),
        ({"_name_or_path": "owner/name", "transformers_version": "5.0.0"}, False),
    ],
)  # fmt: skip
def test_dangerous_entries_are_found_at_any_depth(content: dict[str, Any], dangerous: bool) -> None:
    for item in (content, {"a": content}, {"a": [0, {"b": [content]}]}):
        with pytest.raises(UnsafeModelError) if dangerous else contextlib.nullcontext():
            config_walk.refuse_entries(item, PATH, ANY_TYPE)


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "spm_file", "vocab", "merges"])
def test_a_tokenizers_files_are_found_by_their_usual_names(key: str) -> None:
    def refuse(content: Any) -> None:
        config_walk.refuse_entries(content, Path("tokenizer_config.json"), Dangers())

    with pytest.raises(UnsafeModelError):
        refuse({key: "vocab.txt"})
    refuse({key: None, "name_or_path": "/home/x"})
    # Where old versions kept their cache is never opened.
    refuse({"special_tokens_map_file": "/home/them/.cache/x"})


def test_the_types_are_those_of_the_tables() -> None:
    """A type is on the list when it is built, exported and cut in the tests; no other is."""
    assert set(FAMILIES) | {row.type_name for row in CATALOGUE} == REVIEWED
    others = {"encoder-decoder", "rag", "detr", "timm_wrapper", "timm_backbone"}
    assert not REVIEWED & {*others, "vision-encoder-decoder"}, "they load other models"


def _folder(path: Path, **config: Any) -> Path:
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return path


ANY_TYPE, TRUSTED = Dangers(allow_any_model_type=True), Dangers(trust_remote_code=True)


@pytest.mark.parametrize(
    ("config", "leave", "taken"),
    [
        ({"parts": [{"model_type": "rag"}]}, Dangers(), False),
        ({"parts": [{"model_type": "rag"}]}, ANY_TYPE, True),
        ({"model_type": "detr", "backbone": "a/b"}, Dangers(True, True, True), False),
        ({"model_type": "own", "auto_map": {"AutoConfig": "code.C"}}, TRUSTED, True),
        ({"model_type": "own", "auto_map": {"AutoConfig": "a/b--code.C"}}, TRUSTED, False),
    ],
)
def test_leave_for_one_danger_is_no_leave_for_another(
    tmp_path: Path, config: dict[str, Any], leave: Dangers, taken: bool
) -> None:
    with contextlib.nullcontext() if taken else pytest.raises(UnsafeModelError):
        checked_config(_folder(tmp_path, **config), leave)


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


LONG, ARABIC = "7" * 5_000, "1\N{ARABIC-INDIC DIGIT THREE}"


@pytest.mark.parametrize("digits", [LONG, ARABIC, "\N{SUPERSCRIPT TWO}", "-1", ""])
@pytest.mark.parametrize(
    ("read", "nothing"),
    [
        (number_in, {None}),
        (lambda digits: place_in_layer(f"blk.{digits}.attn_q.weight"), {None}),
        (lambda digits: CACHE_INPUT.fullmatch(f"past_key_values.{digits}.key"), {None}),
        (lambda digits: seed_of(f"self (seed {digits})"), {0, 1, int("7" * 18)}),
    ],
)
def test_numbers_in_names_have_few_digits_and_those_of_ascii(
    digits: str, read: Callable[[str], Any], nothing: set[Any]
) -> None:
    assert read(digits) in nothing


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers"])
def test_a_config_beside_a_graph_tells_of_no_more_layers_than_a_model_has(
    tmp_path: Path, key: str
) -> None:
    def beside(number: int) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"text_config": {key: number}}))
        ModelFolder.beside(tmp_path / "model.onnx", tmp_path)

    beside(MOST_LAYERS)
    with raises(UnsafeModelError, "", tmp_path / "config.json", MOST_LAYERS):
        beside(MOST_LAYERS + 1)


@pytest.mark.parametrize(
    ("key", "number", "is_endless"),
    [
        ("num_hidden_layers", 80, False),
        ("num_experts", 10_001, True),
        ("vocab_size_per_layer_input", 262_144, False),  # of Gemma 3n
        ("moe_shared_expert_intermediate_size", 24_576, False),
    ],
)
def test_sizes_are_no_counts_of_layers(
    tmp_path: Path, key: str, number: int, is_endless: bool
) -> None:
    refused = raises(UnsafeModelError, "", tmp_path, key)
    with refused if is_endless else contextlib.nullcontext():
        config_walk.refuse_entries({key: number}, tmp_path, Dangers())


def test_a_gguf_file_tells_of_no_more_layers_before_transformers_makes_them(tmp_path: Path) -> None:
    tiny = TinyGguf.llama()
    tiny.entries["llama.block_count"] = ("I", (1 << 32) - 1)
    tiny.write(tmp_path / "m.gguf")
    with raises(GgufFileError, "layer-count", tmp_path / "m.gguf", "block_count", MOST_LAYERS):
        resolve_source(str(tmp_path / "m.gguf"))


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
    "parts",
    [
        {"normalizer": precompiled(1_000)},
        {"normalizer": sequence(*[replaced("a", "a" * 50)] * 6)},
        {"normalizer": sequence(*[replaced("", "ab", "Regex")] * 9)},
        {"normalizer": {"type": "Prepend", "prepend": "a" * 1_000}},
        {"decoder": {"type": "Sequence", "decoders": [replaced("a", "a" * 50)] * 6}},
    ],
)
def test_what_makes_a_text_endless_is_refused_before_it_is_loaded(
    tmp_path: Path, parts: dict[str, Any]
) -> None:
    token = {"id": 1, "content": "a", "single_word": False, "lstrip": False, "rstrip": False}
    added = [{**token, "normalized": True, "special": False}]
    path = written(tmp_path, **parts, added_tokens=added)
    path.write_text(path.read_text().replace("Replace", "Repl\\u0061ce"))  # escapes are read, too
    with raises(ComparisonError, "broken-tokenizer", path, 256):
        read_tokenizer(path)


def test_a_long_text_or_file_may_not_grow_as_a_short_one_may(tmp_path: Path) -> None:
    path = written(tmp_path, normalizer=replaced("b", "b" * 100))
    encode = tokenizer_in(path).encode
    assert encode("a", False) == [1]
    with raises(ComparisonError, "broken-tokenizer", path, "400,000"):
        encode("a" * 400_000, False)
    path = written(tmp_path, normalizer=replaced("a", "b"), more=[0])
    path.write_text(path.read_text().replace("[0]", "[" + "[]," * (1 << 24) + "0]"))
    with raises(UnsafeInputError, "too-many-values", path):  # before it takes gigabytes
        read_tokenizer(path)


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


TURNS = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"


def beside(folder: Path, files: dict[str, Any]) -> ChatTemplate | None:
    """The template of a folder with these files."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    return ChatTemplate.beside(folder / "tokenizer.json")


def prompt(template: str, **more: Any) -> str:
    (written,) = ChatTemplate(template, Path(FILE)).prompts(["hi"], **more)
    return written


@pytest.mark.parametrize(
    "files",
    [
        {FILE: TURNS, CONFIG: {"bos_token": "<s>"}},
        {FILE: TURNS, CONFIG: {"bos_token": {"content": "<s>"}, "chat_template": "other"}},
        {CONFIG: {"bos_token": "<s>", "chat_template": TURNS}},
        {
            CONFIG: {
                "chat_template": [
                    {"name": "tool_use", "template": "other"},
                    {"name": "default", "template": TURNS},
                ]
            },
            "special_tokens_map.json": {"bos_token": "<s>"},
        },
        {},
        {CONFIG: {"bos_token": "<s>"}},
        {CONFIG: {"chat_template": 7}},
        {CONFIG: {"chat_template": {"a": "b"}}},
        {CONFIG: {"chat_template": [{"name": "tool_use", "template": "x"}, 3]}},
    ],
)
def test_a_template_is_found_with_its_tokens_and_none_is_made_up(
    tmp_path: Path, files: dict[str, Any]
) -> None:
    result = beside(tmp_path, files)
    assert (result is not None) == (TURNS in str(files))
    turns = ["<s><|user|>hi<|assistant|>", "<s><|user|>ho<|assistant|>"]
    assert result is None or result.prompts(["hi", "ho"]) == turns


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("{% generation %}{{ messages[0]['content'] }}{% endgeneration %}!", "hi!"),
        ("{% for a in [1, 2, 3] %}{% if a == 2 %}{% break %}{% endif %}{{ a }}{% endfor %}", "1"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi"}]'),
        ("{% set n = namespace(a=1) %}{% if true %}{% set n.a = 2 %}{% endif %}{{ n.a }}", "2"),
        ("{% if tools is not none %}tools{% endif %}none", "none"),
        ("  {% if true %}\n  a\n  {% endif %}\n", "  a\n"),
        ("{{ enable_thinking is defined }}", "False"),
        ("{{ strftime_now('%%') }}", "%"),
    ],
)
def test_templates_have_what_transformers_gives_them(template: str, wanted: str) -> None:
    assert prompt(template) == wanted


def test_a_template_has_what_it_is_called_with() -> None:
    assert prompt("{{ enable_thinking }}", enable_thinking=False) == "False"


@pytest.mark.parametrize(
    "template",
    [
        "{% for",
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% set n = namespace(__class__=1) %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ namespace({'_a': 1}) }}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 99 }}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        ENDLESS,
        "{{ '%8999999999d' % 1 }}",
        "{{ '%99999999d' % 1 }}" * 40,
    ],
)
def test_a_template_that_fails_or_reaches_out_is_told(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.models.texts.chat_template._SECONDS", 1)
    with raises(BackendError, "broken-chat-template", FILE):
        prompt(template)


def test_what_all_prompts_become_is_bounded() -> None:
    template = ChatTemplate("{{ 'x' * 999999 }}", Path(FILE))
    assert len(template.prompts(["a"])[0]) == 999_999
    with raises(BackendError, "broken-chat-template", FILE):
        template.prompts(["a"] * 3)
    assert (
        len(ChatTemplate("{{ messages[0].content }}", Path(FILE)).prompts(["a" * 1_500_000] * 3))
        == 3
    )


def test_a_template_is_read_by_the_door(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_text("s")
    (tmp_path / "model" / FILE).symlink_to(tmp_path / "secret")
    with raises(UnsafeInputError, "", tmp_path / "model" / FILE):
        beside(tmp_path / "model", {})
    (tmp_path / FILE).write_bytes(b"\xff")
    with raises(BackendError, "unreadable", tmp_path / FILE):
        beside(tmp_path, {})


@pytest.mark.torch
@pytest.mark.parametrize(
    "template", [TURNS, "{%- for m in messages %}\n  {{ m | tojson }}\n{% endfor %}"]
)
def test_transformers_writes_the_same(tmp_path: Path, template: str) -> None:
    from transformers import PreTrainedTokenizerFast

    write_tokenizer(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path, bos_token="<s>", eos_token="</s>")
    theirs.chat_template = template
    theirs.save_pretrained(tmp_path)
    ours = ChatTemplate.beside(tmp_path / "tokenizer.json")
    assert ours is not None
    said = 'Name <three> "colours" é.'
    turn = [{"role": "user", "content": said}]
    wanted = theirs.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert ours.prompts([said]) == [wanted]


@pytest.mark.torch
@pytest.mark.parametrize("template", [TURNS, {"default": TURNS, "tool_use": "other"}])
def test_a_calibration_on_chats_has_the_same_renderer(
    template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_loaded("llama", tokenizer=tiny_tokenizer())
    tokenizer: Any = loaded.tokenizer
    tokenizer.chat_template = template
    turn = [{"role": "user", "content": "|"}]
    before = (
        tokenizer.apply_chat_template(turn, tokenize=False).partition("|user|>|")[0] + "|user|>"
    )
    assert chat_prefix(loaded) == tokenizer(before, add_special_tokens=False).input_ids
    monkeypatch.setattr("exporter.models.texts.chat_template._SECONDS", 1)
    tokenizer.chat_template = ENDLESS
    with raises(CalibrationError, "broken-chat-template", loaded.ref.source):
        chat_prefix(loaded)
    assert _default_texts(loaded, HealOptions(kind="distill")) == ("pydoc", "self")
