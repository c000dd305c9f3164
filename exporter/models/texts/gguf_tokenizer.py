"""The tokenizer in a GGUF file, read by llama.cpp where no tokenizer.json stands beside it."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import ComparisonError
from exporter.models.gguf.llama_library import llama_library, said


@dataclass(frozen=True)
class Encoding:
    """A text's tokens.

    Attributes:
        ids: Their numbers.
    """

    ids: list[int]


class GgufTokenizer:
    """What the tokenizers library offers of a ``tokenizer.json``, of a GGUF file.

    Args:
        path: The file; its vocabulary is loaded, and no weight.

    Raises:
        ComparisonError: llama.cpp can't read its tokenizer.
        MissingDependencyError: Without llama-cpp-python.
    """

    def __init__(self, path: Path) -> None:
        library = self._library = llama_library()
        params = library.llama_model_default_params()
        params.vocab_only = True
        model = library.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise ComparisonError(
                f"llama.cpp can't read the tokenizer in {path}{said()}.",
                "Copy the model's tokenizer.json beside it.",
                code="broken-tokenizer",
            )
        weakref.finalize(self, library.llama_model_free, model)
        self._vocabulary = library.llama_model_get_vocab(model)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Encoding]:
        """Texts' tokens, special ones by their names in the text too."""
        return [self._encoded(text, add_special_tokens) for text in texts]

    def _encoded(self, text: str, add_special_tokens: bool) -> Encoding:
        data = text.encode()
        room = len(data) + 8  # few tokens are shorter than a byte, but for those that are added
        while True:
            tokens = (ctypes.c_int32 * room)()
            count = self._library.llama_tokenize(
                self._vocabulary, data, len(data), tokens, room, add_special_tokens, True
            )
            if count >= 0:
                return Encoding(list(tokens[:count]))
            if not room < -count < 2**31:  # it doesn't ask for more room
                raise ComparisonError(
                    f"llama.cpp can't tokenize a text of {len(data)} bytes.",
                    "Give a shorter text.",
                    code="not-tokenized",
                )
            room = -count

    def decode(self, ids: Sequence[int]) -> str:
        """The tokens' text, without special tokens."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        room = 0
        while True:
            buffer = ctypes.create_string_buffer(room + 1)
            count = self._library.llama_detokenize(
                self._vocabulary, tokens, len(ids), buffer, room, False, False
            )
            if count >= 0:
                return buffer.raw[:count].decode(errors="replace")
            room = -count
