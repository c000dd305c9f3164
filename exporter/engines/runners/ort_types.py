"""ONNX Runtime's types of tensors as numpy's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import BackendError

_NAMES = {"float": "float32", "double": "float64"}


def dtype_of(value: Any, model: Path) -> np.dtype[Any]:
    """The numpy type of one of a session's inputs or outputs.

    Args:
        value: As the session describes it.
        model: Its file, for the message.

    Raises:
        BackendError: numpy has no such type.
    """
    inner = value.type.removeprefix("tensor(").removesuffix(")")
    if inner == "bfloat16":
        return bfloat16()
    try:
        found: np.dtype[Any] = np.dtype(_NAMES.get(inner, inner))
    except TypeError:
        raise BackendError(
            f"{model}: {value.name} has the type {value.type}, which depthcut can't fill or read."
        ) from None
    return found


def bfloat16() -> np.dtype[Any]:
    """That of ml_dtypes, which comes with onnx."""
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype
