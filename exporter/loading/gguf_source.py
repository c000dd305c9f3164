"""A GGUF file as plain floating-point weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.errors import (
    ModelSourceError,
    UnknownArchitectureError,
    first_line,
    pass_on_memory_error,
)
from exporter.loading.auto_class import auto_class
from exporter.loading.gguf_reading import header_read_once
from exporter.loading.unquantized import unquantized
from exporter.optional import require


def load_gguf(path: Path, dtype: Any) -> tuple[Any, dict[str, Any], Any]:
    """Loads a GGUF file into a model that can be saved and exported like any other.

    Args:
        path: The file.
        dtype: PyTorch's.

    Returns:
        The model, transformers' report of the load, and the tokenizer.

    Raises:
        ModelSourceError: When the file can't be read.
        UnknownArchitectureError: When transformers has no such model.
    """
    transformers = require("transformers", extra="torch")
    require("gguf", extra="gguf")
    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with header_read_once():
            model, info, tokenizer = _load(transformers, place, dtype)
    # The reader has no error class of its own; a cut or odd file gives anything from a KeyError
    # to a numpy reshape error.
    except Exception as error:
        raise _gguf_error(path, error) from error
    return unquantized(model), info, tokenizer


def _load(transformers: Any, place: dict[str, str], dtype: Any) -> tuple[Any, dict[str, Any], Any]:
    config = transformers.AutoConfig.from_pretrained(**place)
    model_class = auto_class(config, trust_remote_code=False)
    model, info = model_class.from_pretrained(
        **place, dtype=dtype, output_loading_info=True, trust_remote_code=False
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    return model, info, tokenizer


def _gguf_error(path: Path, error: Exception) -> ModelSourceError:
    pass_on_memory_error(error)
    told = f"{first_line(error)}."
    if "architecture" in told or "model type" in told:
        return UnknownArchitectureError(f"{path}: {told}")
    return ModelSourceError(
        f"{path} can't be read as a GGUF model: {told}",
        "The file may be cut short, or hold a type that can't be dequantised; fetch it again or "
        "take another quantization.",
    )
