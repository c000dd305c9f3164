"""Tensors of a graph: types, shapes and bytes, and inputs that are made of what it declares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  # it comes with onnx; numpy knows bfloat16 from its import on
import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.latency import Phase, Shape
from exporter.errors import OUT_OF_MEMORY, BackendError, ComparisonError
from exporter.models.graph_facts import CACHE_INPUT
from exporter.models.model_folder import PIXELS

ALIGNMENT_BYTES = 256
"""Of what CUDA hands out; every buffer is rounded up to it."""

LESS_MEMORY = "Stop other programs on the GPU, or build for a smaller batch or a shorter context."

_SHORT = {"float": "float32", "half": "float16", "bf16": "bfloat16", "double": "float64"}
_KNOWN = frozenset(
    {"bool", "bfloat16", "float16", "float32", "float64"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)

TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 6e-2}
"""By precision, how far libraries may differ: :func:`row_error`, or a share of the largest value.

Rounding takes a third of it at most, in ONNX Runtime's own runs of 30 layers; see the page on
engines.
"""


def tolerance_of(precision: str) -> float:
    """What is allowed of a model; of a quantised one as much as of bfloat16."""
    return TOLERANCE.get(precision, TOLERANCE["bf16"])


def row_error(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    """How far the worst row is off, as a share of all rows' root mean square.

    Infinite where the shapes differ, or something is no number.
    """
    if got.shape != wanted.shape:
        return float("inf")
    got, wanted = got.astype(np.float32), wanted.astype(np.float32)
    if not got.size:
        return 0.0
    if not (np.isfinite(got).all() and np.isfinite(wanted).all()):
        return float("inf")
    rows = np.square(got - wanted).mean(axis=-1)
    return float(np.sqrt(rows.max() / max(float(np.square(wanted).mean()), 1e-12)))


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
            code="unknown-input",
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


TOKEN_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids"})
"""Inputs that follow from the tokens and the shape alone."""


def has_cache(specs: Sequence[TensorSpec]) -> bool:
    """Whether a graph takes a KV cache."""
    return any(CACHE_INPUT.fullmatch(spec.name) for spec in specs)


def whole_phase(specs: Sequence[TensorSpec]) -> Phase:
    """What a run of whole sequences is called: they begin a text where there is a KV cache."""
    return "prefill" if has_cache(specs) else "encode"


def make_inputs(
    specs: Sequence[TensorSpec],
    shape: Shape,
    token_ids: NDArray[np.int64],  # `[batch, sequence_length]`
    *,
    cache: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, NDArray[Any]]:
    """Fills every input: real positions, a full mask, a cache of random numbers or a given one.

    Images are normal noise.
    """
    rng = np.random.default_rng(0)
    given = cache or {}
    return {
        spec.name: given[spec.name] if spec.name in given else _fill(spec, shape, token_ids, rng)
        for spec in specs
    }


def random_tokens(shape: Shape, vocabulary: int) -> NDArray[np.int64]:
    """Seeded token ids, ``[batch, sequence_length]``, for where no text is needed."""
    size = (shape.batch, shape.sequence_length)
    return np.random.default_rng(0).integers(0, vocabulary, size, dtype=np.int64)


def _fill(
    spec: TensorSpec, shape: Shape, token_ids: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[Any]:
    total = shape.total_length
    if spec.name == "input_ids":
        return token_ids.astype(spec.dtype)
    if spec.name == "attention_mask":
        return np.ones((shape.batch, total), spec.dtype)
    if spec.name == "position_ids":
        positions = np.arange(shape.past_length, total, dtype=spec.dtype)
        return np.tile(positions, (shape.batch, 1))
    if spec.name == "token_type_ids":
        return np.zeros((shape.batch, shape.sequence_length), spec.dtype)
    if CACHE_INPUT.fullmatch(spec.name):
        return _random_cache(spec, shape, rng)
    if spec.name == PIXELS and all(isinstance(size, int) for size in spec.shape[1:]):
        sizes = [int(size) for size in spec.shape[1:]]  # type: ignore[arg-type]
        return rng.standard_normal((shape.batch, *sizes), dtype=np.float32).astype(spec.dtype)
    raise ComparisonError(
        f"The graph has an input {spec.name!r} that depthcut doesn't know how to fill.",
        "Known: input_ids, attention_mask, position_ids, token_type_ids, past_key_values.N.*, and "
        "pixel_values of a fixed size.",
        code="unknown-input",
    )


def _random_cache(spec: TensorSpec, shape: Shape, rng: np.random.Generator) -> NDArray[Any]:
    if len(spec.shape) != 4 or not all(isinstance(spec.shape[axis], int) for axis in (1, 3)):
        raise ComparisonError(
            f"{spec.name} has the shape {list(spec.shape)}; "
            "[batch, heads, past, head_dim] with numbers for heads and head_dim is needed."
        )
    heads, head_dim = spec.shape[1], spec.shape[3]
    size: tuple[Any, ...] = (shape.batch, heads, shape.past_length, head_dim)
    return rng.standard_normal(size, dtype=np.float32).astype(spec.dtype)
