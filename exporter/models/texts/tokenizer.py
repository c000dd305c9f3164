"""A tokenizer: the one that a loaded model has, or the file ``tokenizer.json`` beside a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import (
    CalibrationError,
    ComparisonError,
    UnsafeInputError,
    first_line,
    panics_as_errors,
)
from exporter.models.gguf.model_files import GGUF_SUFFIX
from exporter.models.texts.gguf_tokenizer import GgufTokenizer
from exporter.optional import require
from graph_passes.files.reading import TABLE_BYTES, read_bytes

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel


@dataclass(frozen=True)
class TextTokenizer:
    """Text to token ids, whichever library does it.

    Attributes:
        encode: From a text, and whether to add the tokenizer's own tokens, to token ids.
        end_id: The token that ends a text; None where there is none, or where a config says it.
    """

    encode: Callable[[str, bool], list[int]]
    end_id: int | None = None

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
    """A loaded model's own tokenizer, from the transformers library.

    Raises:
        CalibrationError: It has none.
    """
    tokenizer: Any = loaded.tokenizer
    if tokenizer is None:
        raise CalibrationError(
            f"{loaded.ref.source} has no tokenizer, so no text can be turned into tokens.",
            "Give a model with its tokenizer or, if it generates, self as the text.",
            code="no-tokenizer",
        )

    def encode(text: str, special: bool) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
        return ids

    return TextTokenizer(encode, tokenizer.eos_token_id)


def tokenizer_in(path: Path) -> TextTokenizer:
    """The tokenizer in a ``tokenizer.json``.

    Raises:
        ComparisonError: The file is no tokenizer.
        MissingDependencyError: Without the tokenizers library.
    """
    tokenizer = read_tokenizer(path)

    def encode(text: str, special: bool) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    return TextTokenizer(encode)


def read_tokenizer(path: Path) -> Any:
    """The tokenizers library's object; it neither pads nor cuts, whatever the file says.

    Of a GGUF file it is one that does the same by llama.cpp.

    Raises:
        UnsafeInputError: It may not be read from where it is.
        ComparisonError: The file is no tokenizer.
        MissingDependencyError: Without the tokenizers library.
    """
    if path.suffix == GGUF_SUFFIX:
        return GgufTokenizer(path)
    module = require("tokenizers", extra="cpu")
    try:
        with panics_as_errors():
            tokenizer = module.Tokenizer.from_buffer(read_bytes(path, limit=TABLE_BYTES))
    except UnsafeInputError:
        raise
    except Exception as error:  # the library raises no class of its own
        raise ComparisonError(
            f"{path} is no tokenizer: {first_line(error)}.",
            "Copy the model's tokenizer there again.",
            code="broken-tokenizer",
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
