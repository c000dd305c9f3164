"""The tokenizer in a model's folder."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from exporter.errors import (
    ModelSourceError,
    UnsafeModelError,
    first_line,
    panics_as_errors,
    pass_on_memory_error,
)
from exporter.models.anatomy.families import REVIEWED
from exporter.models.loading.checked_folder import CONFIG, Dangers, read_object
from exporter.models.loading.sources import TOKENIZER_FILES, matching
from exporter.models.tokenizer_budget import refuse_growing
from exporter.optional import require
from graph_passes.files.reading import TABLE_BYTES, read_bytes, read_json

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
# Those that only read a tokenizer.json, whatever the model; and what hub models name for theirs.
_PLAIN_TOKENIZERS = {"PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer", "GPT2Tokenizer"}


def load_tokenizer(folder: Path, config: Any, dangers: Dangers) -> Any:
    """Loads a tokenizer from a folder that was looked at; None where there is none."""
    transformers = require("transformers", extra="torch")
    if not matching(folder, TOKENIZER_FILES):
        return None
    _refuse_class(folder, dangers)
    if (folder / _FILE).is_file():
        refuse_growing(read_bytes(folder / _FILE, limit=TABLE_BYTES), str(folder / _FILE))
    try:
        with panics_as_errors():
            tokenizer = _read(transformers, folder, config, dangers)
            tokenizer("a")  # some entries are looked at only when there is a text
            return tokenizer
    except Exception as error:
        pass_on_memory_error(error)
        _refuse_nested(folder / _FILE)
        raise ModelSourceError(
            f"The tokenizer in {folder} can't be loaded: {first_line(error)}."
        ) from error


def _read(transformers: Any, folder: Path, config: Any, dangers: Dangers) -> Any:
    how = {"trust_remote_code": dangers.trust_remote_code, "local_files_only": True}
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, config=config, **how)
    except Exception as error:
        pass_on_memory_error(error)
        # 4.57 does not know the class that 5 writes into tokenizer_config.json.
        if not (folder / _FILE).is_file():
            raise
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _refuse_nested(path: Path) -> None:
    """Says so where that is why a tokenizer could not be read; its parsers have other words."""
    with contextlib.suppress(OSError, ValueError):
        read_json(path, limit=TABLE_BYTES)


def _refuse_class(folder: Path, dangers: Dangers) -> None:
    """A tokenizer's class goes by its name in a file, whatever the model is."""
    if dangers.allow_any_model_type or dangers.trust_remote_code:
        return
    for path in (folder / _CONFIG, folder / CONFIG):
        name = read_object(path).get("tokenizer_class") if path.exists() else None
        if name is not None and not (isinstance(name, str) and _is_reviewed_class(name)):
            raise UnsafeModelError(
                f"{path}: $.tokenizer_class is {str(name)[:60]!r}, whose code in transformers was "
                "not looked at for depthcut.",
                "Load it with --allow-any-model-type if you trust the model.",
            )


def _is_reviewed_class(name: str) -> bool:
    """Whether a tokenizer's class belongs to a reviewed type, or is none that transformers has.

    transformers takes its plain class, or refuses, where it does not know a name.
    """
    transformers = require("transformers", extra="torch")
    bare = name.removesuffix("Fast")
    known = any(hasattr(transformers, each) for each in (bare, f"{bare}Fast"))
    return bare in _reviewed_tokenizers() or not known


def _reviewed_tokenizers() -> set[str]:
    auto: Any = require("transformers.models.auto.tokenization_auto", extra="torch")
    found = set(_PLAIN_TOKENIZERS)
    for model_type in REVIEWED:
        classes = auto.TOKENIZER_MAPPING_NAMES.get(model_type)
        # A name in transformers 5, a slow one and a fast one in 4.57.
        for name in (classes,) if isinstance(classes, str) else classes or ():
            found.add((name or "").removesuffix("Fast"))
    return found - {""}
