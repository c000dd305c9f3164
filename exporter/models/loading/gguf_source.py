"""A GGUF file as plain floating-point weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.errors import (
    ModelSourceError,
    UnknownArchitectureError,
    UnsafeModelError,
    first_line,
    pass_on_memory_error,
)
from exporter.models.loading.auto_class import auto_class
from exporter.models.loading.checked_folder import Dangers
from exporter.models.loading.config_walk import refuse_types
from exporter.models.loading.gguf_reading import header_read_once
from exporter.models.loading.model_types import REVIEWED
from exporter.models.loading.unquantized import unquantized
from exporter.optional import require
from exporter.scratch import scratch_folder


def load_gguf(
    path: Path, dtype: Any, dangers: Dangers | None = None
) -> tuple[Any, dict[str, Any], Any]:
    """Loads a GGUF file into a model that can be saved and exported like any other.

    transformers would read more of the file's folder: it gets one with nothing else in it.

    Args:
        path: The file.
        dtype: PyTorch's.
        dangers: What the model may do; by default nothing special.

    Returns:
        The model, transformers' report of the load, and the tokenizer.

    Raises:
        UnsafeModelError: It is of a model type that was not looked at.
        ModelSourceError: When the file can't be read.
        UnknownArchitectureError: When transformers has no such model.
    """
    transformers = require("transformers", extra="torch")
    require("gguf", extra="gguf")
    try:
        with header_read_once(), scratch_folder("gguf") as folder:
            link = folder / path.name
            link.symlink_to(path.resolve())
            model, info, tokenizer = _load(transformers, link, dtype, dangers or Dangers())
        model.config.name_or_path = str(path.parent)
    except UnsafeModelError:
        raise
    # The reader has no error class of its own; a cut or odd file gives anything from a KeyError
    # to a numpy reshape error.
    except Exception as error:
        raise _gguf_error(path, error) from error
    return unquantized(model), info, tokenizer


def _load(
    transformers: Any, path: Path, dtype: Any, dangers: Dangers
) -> tuple[Any, dict[str, Any], Any]:
    place = {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "local_files_only": True,
    }
    config = transformers.AutoConfig.from_pretrained(**place)
    if not dangers.allow_any_model_type:
        refuse_types({"model_type": config.model_type}, path.resolve(), REVIEWED)
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
