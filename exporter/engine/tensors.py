"""The types of an engine's tensors, by the names that the library gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from exporter.errors import EngineError

_NAMES = {"float": "float32", "half": "float16"}
_SAME = frozenset({"int64", "int32", "int8", "uint8", "bool"})


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy type of an engine's type; bfloat16 is that of ml_dtypes.

    Args:
        name: As an engine's record has it, such as ``half`` or ``bf16``.

    Raises:
        EngineError: numpy has no such type.
    """
    if name == "bf16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    if name in _SAME or name in _NAMES:
        return np.dtype(_NAMES.get(name, name))
    raise EngineError(
        f"An input or output has the type {name}, which depthcut can't fill or read.",
        "Leave the ends of the graph in a float type.",
    )


def byte_count(dtype: np.dtype[Any], shape: Sequence[int]) -> int:
    """Bytes of a tensor without gaps."""
    return dtype.itemsize * math.prod(shape)


def written_shape(shape: Sequence[int]) -> str:
    """A shape as it is said: ``1x8x512x64``."""
    return "x".join(map(str, shape))
