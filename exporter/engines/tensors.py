"""Tensors' types, shapes and bytes, and how much device memory a run needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  # it comes with onnx; numpy knows bfloat16 from its import on
import numpy as np

from exporter.errors import OUT_OF_MEMORY, BackendError

ALIGNMENT_BYTES = 256
"""Of what CUDA hands out; every buffer is rounded up to it."""

LESS_MEMORY = "Stop other programs on the GPU, or build for a smaller batch or a shorter context."

_SHORT = {"float": "float32", "half": "float16", "bf16": "bfloat16", "double": "float64"}
_KNOWN = frozenset(
    {"bool", "bfloat16", "float16", "float32", "float64"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)

TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
"""By precision, how far libraries may differ; times a tensor's largest value, or 1 when smaller.

A wrong layer is off by a large part of that; two libraries' rounding is below it by ten times.
ONNX Runtime's CPU runs bfloat16 in float32, so there it is all of bfloat16's rounding; no card has
tried that one yet.
"""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


def numpy_dtype(name: str, tensor: str = "An input or output") -> np.dtype[Any]:
    """The numpy type of a runtime's type; bfloat16 is that of ml_dtypes."""
    value = _SHORT.get(name, name)
    if value not in _KNOWN:
        raise BackendError(
            f"{tensor} has the type {name}, which depthcut can't fill or read.",
            "Leave the ends of the graph in a float type.",
            code="unknown-type",
        )
    return np.dtype(value)


def byte_count(dtype: np.dtype[Any], shape: Sequence[int]) -> int:
    """Bytes of a tensor without gaps."""
    return dtype.itemsize * math.prod(shape)


def written_shape(shape: Sequence[int]) -> str:
    """A shape as it is said: ``1x8x512x64``."""
    return "x".join(map(str, shape))


def rounded_up(size_bytes: int) -> int:
    """A buffer's size: never nothing, since an empty tensor needs an address too."""
    return max(1, -(-size_bytes // ALIGNMENT_BYTES)) * ALIGNMENT_BYTES


def plan_buffers(profiles: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """One buffer for each tensor, large enough for every profile: only one runs at a time."""
    plan: dict[str, int] = {}
    for sizes in profiles:
        for name, size in sizes.items():
            plan[name] = max(plan.get(name, 0), rounded_up(size))
    return plan


def out_of_memory(what: str, asked: int, free: int, total: int) -> BackendError:
    """The error for a device that has too little left; all sizes in bytes."""
    takes, left, whole = (bytes_in_words(size) for size in (asked, free, total))
    return BackendError(
        f"{what} takes {takes} of device memory; {left} of {whole} are free.",
        LESS_MEMORY,
        code=OUT_OF_MEMORY,
    )


def bytes_in_words(size: int) -> str:
    """A size in GB or MB (10^9, 10^6 bytes)."""
    return f"{size / 1e9:.2f} GB" if size >= 10_000_000 else f"{size / 1e6:.2f} MB"
