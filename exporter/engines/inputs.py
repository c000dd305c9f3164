"""Inputs for a Transformer's graph, made from the names and shapes that the graph declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.latency import Phase, Shape
from exporter.engines.runners.base import Array
from exporter.engines.tensors import TensorSpec
from exporter.errors import ComparisonError
from exporter.models.graph_facts import CACHE_INPUT
from exporter.models.model_folder import PIXELS

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
    cache: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
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
) -> Array:
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


def _random_cache(spec: TensorSpec, shape: Shape, rng: np.random.Generator) -> Array:
    if len(spec.shape) != 4 or not all(isinstance(spec.shape[axis], int) for axis in (1, 3)):
        raise ComparisonError(
            f"{spec.name} has the shape {list(spec.shape)}; "
            "[batch, heads, past, head_dim] with numbers for heads and head_dim is needed."
        )
    heads, head_dim = spec.shape[1], spec.shape[3]
    size: tuple[Any, ...] = (shape.batch, heads, shape.past_length, head_dim)
    return rng.standard_normal(size, dtype=np.float32).astype(spec.dtype)
