"""The tokenizer beside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.errors import ComparisonError, UnsafeInputError, first_line, panics_as_errors
from exporter.optional import require
from graph_passes.files.reading import TABLE_BYTES, read_bytes


def load_tokenizer(path: Path) -> Any:
    """Reads a ``tokenizer.json``; it neither pads nor cuts, whatever the file says.

    Raises:
        UnsafeInputError: It may not be read from where it is.
        ComparisonError: The file is no tokenizer.
        MissingDependencyError: Without the tokenizers library.
    """
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
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
