"""How a model that was trained on chats is asked: the template that its tokenizer brings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.errors import BackendError
from exporter.models.gguf_model_files import GGUF_SUFFIX, read_model
from exporter.models.model_folder import read_object
from exporter.processes import run_limited
from graph_passes.files.reading import read_text

_FILE = "chat_template.jinja"
_CONFIG, _SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
_USUAL = "default"  # of several templates, the one for chats
_WORKER = ("-P", "-m", "exporter.models.texts.chat_renderer")
_SECONDS, _PROMPTS_A_SECOND = 10, 20  # of the processor
_TIMES = 3  # as many seconds by the clock
_BYTES = 1 << 30
_GGUF_TEMPLATE, _GGUF_TOKENS = "tokenizer.chat_template", "tokenizer.ggml.tokens"
_GGUF_NAMED = {f"{name}_token": f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "unk")}
_SPECIAL_NAME = re.compile(r"\w+_token")


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and the special tokens that it may write."""

    text: str
    place: Path
    tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def beside(cls, tokenizer: Path) -> ChatTemplate | None:
        """The template in a tokenizer's folder: ``chat_template.jinja``, or in its config."""
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
        return cls(text, file, {key: token for key, token in tokens.items() if token is not None})

    def prompts(self, said: Sequence[str | Sequence[str]], **more: object) -> list[str]:
        """What the model reads when a user says something: up to where its answer begins.

        Of several texts in turn, every second one is an answer of the model's.
        """
        seconds = _SECONDS + len(said) // _PROMPTS_A_SECOND
        result = {"add_generation_prompt": True, "tools": None, "documents": None}
        request = {
            "template": self.text,
            "variables": {**self.tokens, **result, **more},
            "said": [*said],
            "seconds": seconds,
            "nbytes": _BYTES,
        }
        stopped = f"it takes more than {seconds} s or {_BYTES >> 20} MB"
        limited = run_limited(_WORKER, request, _TIMES * seconds) or {"error": stopped}
        if "error" in limited:
            raise BackendError(
                f"The chat template in {self.place} fails: {limited['error']}.",
                "Mend it, or leave it out: the prompt is then continued as it is.",
                code="broken-chat-template",
            )
        written: list[str] = limited["written"]
        return written


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a config names, as a text or as an object with its content."""
    texts = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if _SPECIAL_NAME.fullmatch(key) and isinstance(text, str):
            texts[key] = text
    return texts


def _usual(value: object) -> str | None:
    """The template of a config, which may have several by name."""
    named = value if isinstance(value, list) else [{"name": _USUAL, "template": value}]
    texts = (
        item.get("template")
        for item in named
        if isinstance(item, dict) and item.get("name") == _USUAL
    )
    return next((text for text in texts if isinstance(text, str)), None)
