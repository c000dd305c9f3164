"""Chat templates: where they stand, what they write, what they may not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import BackendError, CalibrationError, UnsafeInputError
from exporter.heal.options import HealOptions
from exporter.heal.texts import _default_texts
from exporter.models.texts.chat_template import ChatTemplate
from exporter.models.texts.self_text import chat_prefix
from tests.raising import raises

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
    ],
)
def test_a_template_is_found_with_its_tokens(tmp_path: Path, files: dict[str, Any]) -> None:
    result = beside(tmp_path, files)
    assert result is not None
    turns = ["<s><|user|>hi<|assistant|>", "<s><|user|>ho<|assistant|>"]
    assert result.prompts(["hi", "ho"]) == turns


@pytest.mark.parametrize(
    "files",
    [
        {},
        {CONFIG: {"bos_token": "<s>"}},
        {CONFIG: {"chat_template": 7}},
        {CONFIG: {"chat_template": {"a": "b"}}},
        {CONFIG: {"chat_template": [{"name": "tool_use", "template": "x"}, 3]}},
    ],
)
def test_where_there_is_none_none_is_made_up(tmp_path: Path, files: dict[str, Any]) -> None:
    assert beside(tmp_path, files) is None


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


def test_variables_that_some_templates_know_reach_them() -> None:
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

    from tests.text_graphs import write_tokenizer

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
    from tests.tiny_models import tiny_loaded, tiny_tokenizer

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
