"""A model's tokenizer, and what its configs say of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from exporter.errors import BackendError
from exporter.models.gguf_model_files import GGUF_SUFFIX, gguf_folder
from exporter.models.model_folder import longest_sequence, read_config, read_object, token_ids
from exporter.models.texts.chat_template import ChatTemplate
from exporter.models.texts.tokenizer import encoder_of, read_tokenizer
from exporter.optional import require

_FILE = "tokenizer.json"
_BROKEN = "\ufffd"  # stands for a character's first bytes


@dataclass(frozen=True)
class TextModel:
    """What turns text into tokens and back."""

    tokenizer: Path
    stop_ids: frozenset[int]
    positions: int | None = None  # how many positions the model knows; None where no config says so
    prefix_id: int | None = None  # None where nobody asked

    @classmethod
    def of(cls, model: Path, tokenizer: Path | None = None) -> TextModel:
        """Reads what stands beside the model, or elsewhere."""
        in_gguf = model.suffix == GGUF_SUFFIX and model.is_file()
        own: dict[str, Any] = {}
        if in_gguf:
            folder = gguf_folder(model)
            model, own = folder.onnx, folder.config
        home = model if model.is_dir() else model.parent
        given = tokenizer or home
        file = given / _FILE if given.is_dir() else given
        if in_gguf and tokenizer is None and not file.is_file():
            file = model
        if not file.is_file():
            if not model.exists():
                raise BackendError(
                    f"{model} does not exist.",
                    "Name a model's file or folder.",
                    code="file-missing",
                )
            beside = f"beside {model}" if tokenizer is None else f"at {tokenizer}"
            raise BackendError(
                f"There is no {_FILE} {beside}.",
                "Copy the model's tokenizer there, or say with --tokenizer where it is.",
                code="no-tokenizer",
            )
        config = own or read_config(home) or read_config(file.parent)
        # Chat models often end a turn with a token of which only the generation config knows.
        generation = _first(home, file.parent, "generation_config.json")
        ends = generation.get("eos_token_id", config.get("eos_token_id"))
        return cls(file, frozenset(token_ids(ends)), longest_sequence(config))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The text's tokens, with those that the tokenizer adds by itself or without."""
        return self._encode(text, special)

    def encode_chats(self, said: Sequence[str | Sequence[str]], **more: object) -> list[list[int]]:
        """The tokens of users' words in the chat template, up to where the answers begin."""
        if self.chat is None:
            raise BackendError(
                f"There is no chat template beside {self.tokenizer}: neither chat_template.jinja "
                "nor an entry in tokenizer_config.json.",
                "Leave --chat out to have the prompt continued as it is, or name the folder of a "
                "tokenizer that has one with --tokenizer.",
                code="no-chat-template",
            )
        return [self.encode(text, special=False) for text in self.chat.prompts(said, **more)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The tokens' text, without special tokens."""
        text: str = self._loaded.decode(list(token_ids))
        return text

    def stream(self, write: Callable[[str], object]) -> TextStream:
        """Writes a text while its tokens come."""
        return TextStream(self, write)

    @cached_property
    def chat(self) -> ChatTemplate | None:
        """The chat template in the tokenizer's folder, or in the GGUF file."""
        return ChatTemplate.beside(self.tokenizer)

    @cached_property
    def _encode(self) -> Callable[[str, bool], list[int]]:
        return encoder_of(self.tokenizer, self._loaded)

    @cached_property
    def _loaded(self) -> Any:
        return read_tokenizer(self.tokenizer)


class TextStream:
    """Writes what new tokens add to a text; a character that isn't whole yet waits."""

    def __init__(self, texts: TextModel, write: Callable[[str], object]) -> None:
        self._texts = texts
        self._write = write
        self._ids: list[int] = []
        self._decoder: Any = None
        if texts.tokenizer.suffix != GGUF_SUFFIX:
            decoders = require("tokenizers.decoders", extra="cpu")
            self._decoder = decoders.DecodeStream(skip_special_tokens=True)
        self._written = ""

    def add(self, token: int) -> None:
        """Takes one more token."""
        if self._decoder is not None:
            self._put(self._decoder.step(self._texts._loaded, token) or "")
            return
        self._ids.append(token)
        text = self._texts.decode(self._ids)
        if not text.endswith(_BROKEN):
            self.finish(self._ids)

    def finish(self, token_ids: Sequence[int]) -> None:
        """Writes what is still held back of the whole text."""
        text = self._texts.decode(token_ids)
        if text.startswith(self._written):
            self._put(text[len(self._written) :])

    def _put(self, piece: str) -> None:
        if piece:
            self._written += piece
            self._write(piece)


def _first(home: Path, other: Path, name: str) -> dict[str, Any]:
    return read_object(home / name) or read_object(other / name)
