"""A GGUF file as plain floating-point weights."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import (
    ModelSourceError,
    UnknownArchitectureError,
    UnsafeModelError,
    first_line,
    pass_on_memory_error,
)
from exporter.files import scratch_folder
from exporter.models.families import REVIEWED
from exporter.models.loading.checked_folder import Dangers, refuse_types
from exporter.models.loading.model_class import auto_class
from exporter.optional import require

_CHANGED = threading.RLock()


def load_gguf(
    path: Path, dtype: Any, dangers: Dangers | None = None
) -> tuple[Any, dict[str, Any], Any]:
    """Loads a GGUF file into a model that can be saved and exported like any other.

    transformers would read more of the file's folder: it gets one with nothing else in it.
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
    return _unquantized(model), info, tokenizer


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
    text = f"{first_line(error)}."
    if "architecture" in text or "model type" in text:
        return UnknownArchitectureError(f"{path}: {text}", code="unknown-family")
    return ModelSourceError(
        f"{path} can't be read as a GGUF model: {text}",
        "The file may be cut short, or hold a type that can't be dequantised; fetch it again or "
        "take another quantization.",
        code="unreadable",
    )


def _unquantized(model: Any) -> Any:
    """The same weights in a model that does not remember that they were quantized.

    transformers refuses to save or further convert a model that came from GGUF.
    """
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with _no_init_weights():
        fresh = type(model)(config).to(model.dtype)
    # assign: the tensors move over, they are not copied.
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    return fresh


def _no_init_weights() -> contextlib.AbstractContextManager[None]:
    try:
        holder = importlib.import_module("transformers.initialization")
    except ImportError:  # transformers 4.57
        holder = importlib.import_module("transformers.modeling_utils")
    context: contextlib.AbstractContextManager[None] = holder.no_init_weights()
    return context


@contextlib.contextmanager
def header_read_once() -> Iterator[None]:
    """Lets gguf's readers and tables of names take over what an equal one has worked out before.

    Nothing is kept past the end. Loads in several threads wait for each other.
    """
    gguf = require("gguf", extra="gguf")
    with _CHANGED, contextlib.ExitStack() as stack:
        for kind in (gguf.GGUFReader, gguf.TensorNameMap):
            stack.callback(setattr, kind, "__init__", kind.__init__)
            stack.callback(delattr, kind, "__setattr__")
            kind.__init__, kind.__setattr__ = _once(kind), _set_without_memmap
        yield


def _once(kind: Any) -> Any:
    """The class's ``__init__``, which runs once for the same arguments."""
    real = kind.__init__
    known: dict[Any, dict[str, Any]] = {}

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        key = (args, tuple(kwargs.items()))
        if key not in known:
            real(self, *args, **kwargs)
            known[key] = vars(self).copy()
        vars(self).update(known[key])

    return init


def _set_without_memmap(self: Any, name: str, value: Any) -> None:
    # Slicing numpy's memmap costs several times what slicing a plain array over the same bytes
    # does, and a vocabulary is hundreds of thousands of slices.
    object.__setattr__(self, name, np.asarray(value) if isinstance(value, np.memmap) else value)
