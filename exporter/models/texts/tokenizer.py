"""A tokenizer: a loaded model's, the file beside a graph, or llama.cpp's of a GGUF file."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import CalibrationError, ComparisonError
from exporter.models.gguf_model_files import GGUF_SUFFIX
from exporter.models.tokenizer_budget import Budget, broken_tokenizer, refuse_growing
from exporter.optional import require
from graph_passes.files.reading import TABLE_BYTES, read_bytes

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel


@dataclass(frozen=True)
class Encoding:
    """A text's tokens."""

    ids: list[int]


class GgufTokenizer:
    """What the tokenizers library offers of a ``tokenizer.json``, of a GGUF file."""

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
                    code="broken-tokenizer",
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


Encoded = tuple[list[int], list[int] | None]
"""Token ids, and of which text each is, 0 or 1."""


@dataclass(frozen=True)
class TextTokenizer:
    """Text to token ids, whichever library does it."""

    encode: Callable[[str, bool], list[int]]
    end_id: int | None = None  # None where there is none, or where a config says it
    encode_pair: Callable[[str, str, int], Encoded] | None = None

    def pair(self, first: str, second: str, longest: int) -> Encoded:
        """Two texts as one, with the tokenizer's own tokens; the longer loses its end."""
        if self.encode_pair is None:
            raise CalibrationError(
                "This tokenizer puts no two texts together.",
                "Give the model with its tokenizer.json.",
                code="no-pairs",
            )
        return self.encode_pair(first, second, longest)

    def plain(self, text: str) -> list[int]:
        """The text's token ids and no others."""
        return self.encode(text, False)

    @cached_property
    def ends(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind a text, such as BERT's [CLS] and [SEP]."""
        plain, special = self.encode("a", False), self.encode("a", True)
        for start in range(len(special) - len(plain) + 1):
            if special[start : start + len(plain)] == plain:
                return special[:start], special[start + len(plain) :]
        return [], []


def tokenizer_of(loaded: LoadedModel) -> TextTokenizer:
    """A loaded model's own tokenizer, from the transformers library."""
    tokenizer: Any = loaded.tokenizer
    if tokenizer is None:
        raise CalibrationError(
            f"{loaded.ref.source} has no tokenizer, so no text can be turned into tokens.",
            "Give a model with its tokenizer or, if it generates, self as the text.",
            code="no-tokenizer",
        )

    budget = Budget.of(loaded.ref.source, getattr(tokenizer, "backend_tokenizer", None))

    def encode(text: str, special: bool) -> list[int]:
        outcome = budget.run(len(text), lambda: tokenizer(text, add_special_tokens=special))
        ids: list[int] = outcome.input_ids
        return ids

    def encode_pair(first: str, second: str, longest: int) -> Encoded:
        cut = {"truncation": "longest_first", "max_length": longest}
        result = budget.run(len(first) + len(second), lambda: tokenizer(first, second, **cut))
        return result["input_ids"], result.get("token_type_ids")

    return TextTokenizer(encode, tokenizer.eos_token_id, encode_pair)


def tokenizer_in(path: Path) -> TextTokenizer:
    """The tokenizer in a ``tokenizer.json``."""
    encode = encoder_of(path, read_tokenizer(path))

    @cache
    def cutting(longest: int) -> Any:
        own = read_tokenizer(path)
        own.enable_truncation(longest, strategy="longest_first")
        return own

    def encode_pair(first: str, second: str, longest: int) -> Encoded:
        own = cutting(longest)
        budget = Budget.of(str(path), own)
        (result,) = budget.run(
            len(first) + len(second), lambda: own.encode_batch([(first, second)])
        )
        return result.ids, result.type_ids

    is_gguf = path.suffix == GGUF_SUFFIX  # llama.cpp puts no two texts together
    return TextTokenizer(encode, encode_pair=None if is_gguf else encode_pair)


def encoder_of(path: Path, tokenizer: Any) -> Callable[[str, bool], list[int]]:
    """From a text, and whether to add the tokenizer's own tokens, to token ids, within a budget."""
    budget = Budget.of(str(path), tokenizer)

    def encode(text: str, special: bool) -> list[int]:
        # A batch leaves Python alone meanwhile, so that time can run out.
        (result,) = budget.run(
            len(text), lambda: tokenizer.encode_batch([text], add_special_tokens=special)
        )
        ids: list[int] = result.ids
        return ids

    return encode


def read_tokenizer(path: Path) -> Any:
    """The tokenizers library's object; it neither pads nor cuts, whatever the file says.

    Of a GGUF file it is one that does the same by llama.cpp.
    """
    if path.suffix == GGUF_SUFFIX:
        return GgufTokenizer(path)
    module = require("tokenizers", extra="cpu")
    with broken_tokenizer(f"{path} is no tokenizer"):
        content = read_bytes(path, limit=TABLE_BYTES)
        refuse_growing(content, str(path))
        tokenizer = module.Tokenizer.from_buffer(content)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


_WARNING, _ERROR = 3, 4  # ggml.h
_MOST = 16
_SAID: dict[int, list[str]] = {_ERROR: [], _WARNING: []}
_HEARING: dict[str, Any] = {}  # by version; llama.cpp calls it as long as the process lives


def llama_library() -> Any:
    """The module ``llama_cpp``, whose messages go to :func:`said` instead of the terminal."""
    library = require("llama_cpp", extra="llama-cpp")
    library.llama_backend_init()
    hearing = _HEARING.setdefault(library.__version__, library.llama_log_callback(_hear))
    library.llama_log_set(hearing, ctypes.c_void_p(0))
    forget_said()
    return library


def forget_said() -> None:
    """Drops what llama.cpp has told; before a call whose failure is to be explained."""
    for texts in _SAID.values():
        texts.clear()


def said() -> str:
    """The first error that llama.cpp has told of, else its first warning, behind a colon.

    Empty for neither.
    """
    text = next((texts[0] for texts in _SAID.values() if texts), "")
    return f": {text.rstrip('.')}" if text else ""


def _hear(level: int, text: bytes, _user: Any) -> None:
    texts = _SAID.get(level)
    if texts is not None and text.strip() and len(texts) < _MOST:
        texts.append(text.decode(errors="replace").strip())
