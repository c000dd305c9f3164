"""The tokenizer in a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.errors import ModelSourceError, UnsafeModelError, first_line, pass_on_memory_error
from exporter.loading.checked_folder import CONFIG, Leave, read_object
from exporter.loading.model_types import is_reviewed_tokenizer
from exporter.loading.sources import TOKENIZER_FILES, matching
from exporter.optional import require

_CONFIG = "tokenizer_config.json"


def load_tokenizer(folder: Path, config: Any, leave: Leave) -> Any:
    """Loads a tokenizer from a folder that was looked at; None where there is none.

    Args:
        folder: The model's.
        config: The model's, as it was loaded.
        leave: What the model may do.

    Raises:
        UnsafeModelError: Its class is one that was not looked at.
        ModelSourceError: It can't be read.
    """
    transformers = require("transformers", extra="torch")
    if not matching(folder, TOKENIZER_FILES):
        return None
    _refuse_class(folder, leave)
    how = {"trust_remote_code": leave.trust_remote_code, "local_files_only": True}
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, config=config, **how)
    except Exception as error:
        pass_on_memory_error(error)
        if _is_nested(error):
            raise UnsafeModelError(f"The tokenizer in {folder} is nested too deep.") from error
        # 4.57 does not know the class that 5 writes into tokenizer_config.json.
        if (folder / "tokenizer.json").is_file():
            return transformers.PreTrainedTokenizerFast.from_pretrained(
                folder, local_files_only=True
            )
        raise ModelSourceError(
            f"The tokenizer in {folder} can't be loaded: {first_line(error)}."
        ) from error


def _is_nested(error: Exception) -> bool:
    """Whether a parser ran out of levels: Python's, or that of the tokenizers library."""
    return isinstance(error, RecursionError) or "recursion limit" in str(error)


def _refuse_class(folder: Path, leave: Leave) -> None:
    """A tokenizer's class goes by its name in a file, whatever the model is."""
    if leave.allow_any_model_type or leave.trust_remote_code:
        return
    for path in (folder / _CONFIG, folder / CONFIG):
        name = read_object(path).get("tokenizer_class") if path.exists() else None
        if name is not None and not (isinstance(name, str) and is_reviewed_tokenizer(name)):
            raise UnsafeModelError(
                f"{path}: $.tokenizer_class is {str(name)[:60]!r}, whose code in transformers was "
                "not looked at for depthcut.",
                "Load it with --allow-any-model-type if you trust the model.",
            )
