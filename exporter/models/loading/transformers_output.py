"""Keeps what transformers prints off the user's terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from exporter.optional import require


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' bars and advice off the terminal; errors still come as exceptions."""
    logging = require("transformers.utils.logging", extra="torch")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with _quiet_gguf_bar():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _quiet_gguf_bar() -> Iterator[None]:
    # The GGUF reader draws its bar with tqdm itself, past transformers' own switch.
    reader: Any = require("transformers.modeling_gguf_pytorch_utils", extra="torch")
    bar = reader.tqdm
    reader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reader.tqdm = bar
