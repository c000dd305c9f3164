"""Makes a model that came from quantized weights one that was never quantized."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any


def unquantized(model: Any) -> Any:
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
