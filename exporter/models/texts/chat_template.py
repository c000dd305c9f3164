"""How a model that was trained on chats is asked: the template that its tokenizer brings.

It is a Jinja template of a stranger's, so it runs in Jinja's sandbox, which knows what transformers
gives a template, and nothing else. Without transformers, which not every machine has that runs a
graph.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from exporter.errors import BackendError, first_line
from exporter.models.gguf.model_files import GGUF_SUFFIX, read_model
from exporter.models.model_folder import read_object
from graph_passes.files.reading import read_text

_FILE = "chat_template.jinja"
_CONFIG, _SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
_USUAL = "default"  # of several templates, the one for chats
_MOST_CHARACTERS = 1 << 20
_GGUF_TEMPLATE, _GGUF_TOKENS = "tokenizer.chat_template", "tokenizer.ggml.tokens"
_GGUF_NAMED = {f"{name}_token": f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "unk")}
_SPECIAL_NAME = re.compile(r"\w+_token")


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and the special tokens that it may write.

    Attributes:
        text: Jinja.
        place: The file that it stands in.
        tokens: Special tokens by what the tokenizer's config calls them, such as ``bos_token``.
    """

    text: str
    place: Path
    tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def beside(cls, tokenizer: Path) -> ChatTemplate | None:
        """The template in a tokenizer's folder: ``chat_template.jinja``, or in its config.

        Args:
            tokenizer: The file ``tokenizer.json``, or the GGUF file that the tokenizer is in.

        Returns:
            None where there is none.

        Raises:
            UnsafeInputError: A file may not be read from where it is.
            ComparisonError: A config is no JSON object.
            BackendError: The template is no text.
            GgufFileError: The GGUF file can't be read.
        """
        if tokenizer.suffix == GGUF_SUFFIX:
            return cls._in_gguf(tokenizer)
        folder = tokenizer.parent
        config = read_object(folder / _CONFIG)
        tokens = _named_tokens(read_object(folder / _SPECIAL)) | _named_tokens(config)
        file = folder / _FILE
        try:
            return cls(read_text(file), file, tokens)
        except FileNotFoundError:
            text = _usual(config.get("chat_template"))
            return None if text is None else cls(text, folder / _CONFIG, tokens)
        except (OSError, UnicodeDecodeError) as error:
            raise BackendError(f"{file} can't be read: {error}.", code="unreadable") from error

    @classmethod
    def _in_gguf(cls, file: Path) -> ChatTemplate | None:
        entries = read_model(file).entries
        text = entries[_GGUF_TEMPLATE].text if _GGUF_TEMPLATE in entries else None
        if text is None:
            return None
        table = entries.get(_GGUF_TOKENS)
        numbers = {key: entries[name].whole for key, name in _GGUF_NAMED.items() if name in entries}
        tokens = {
            key: table.string(number)
            for key, number in numbers.items()
            if table is not None and number is not None
        }
        return cls(text, file, {key: told for key, told in tokens.items() if told is not None})

    def prompt(self, said: str, **more: object) -> str:
        """What the model reads when a user says something: up to where its answer begins.

        Args:
            said: The user's words.
            more: Variables that some templates know, such as ``enable_thinking``.

        Raises:
            BackendError: The template can't be read, refuses the words, or writes without end.
        """
        told = {
            "messages": [{"role": "user", "content": said}],
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }
        try:
            return _bounded(self._compiled, {**self.tokens, **told, **more})
        except Exception as error:  # jinja2's, and whatever the template raises
            raise BackendError(
                f"The chat template in {self.place} fails: {first_line(error)}.",
                "Mend it, or leave it out: the prompt is then continued as it is.",
                code="broken-chat-template",
            ) from error

    @cached_property
    def _compiled(self) -> Template:
        return _environment().from_string(self.text)


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a config names, as a text or as an object with its content."""
    named = {key: told for key, told in config.items() if _SPECIAL_NAME.fullmatch(key)}
    texts = {
        key: told.get("content") if isinstance(told, dict) else told for key, told in named.items()
    }
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _usual(told: object) -> str | None:
    """The template of a config, which may have several by name."""
    named = told if isinstance(told, list) else [{"name": _USUAL, "template": told}]
    texts = (
        each.get("template")
        for each in named
        if isinstance(each, dict) and each.get("name") == _USUAL
    )
    return next((text for text in texts if isinstance(text, str)), None)


def _bounded(template: Template, told: Mapping[str, object]) -> str:
    written = ""
    for piece in template.generate(told):
        written += piece
        if len(written) > _MOST_CHARACTERS:
            raise TemplateError(f"it writes more than {_MOST_CHARACTERS:,} characters")
    return written


class _Answers(Extension):
    """The tag that marks a model's own words for training; here it says nothing."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What stands within the tag, as it is."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Names(Namespace):
    """Jinja's own lets a template write attributes of Python's, such as ``__class__``."""

    def __init__(self, /, *given: Any, **named: Any) -> None:
        values = dict(*given, **named)
        for name in values:
            _refuse_hidden(name)
        super().__init__(values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_hidden(name)
        super().__setitem__(name, value)


def _refuse_hidden(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace has no {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers renders chat templates in: its filters, functions and rules of spaces."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Answers, loopcontrols]
    )
    made.filters["tojson"] = _json
    made.globals.update(namespace=_Names, raise_exception=_refuse, strftime_now=_now)
    return made


def _json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
