"""Random inputs for any Transformer's graph, drawn from what the graph declares."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import VerificationError
from graph_passes.finding.shapes import head_size
from graph_passes.types import number_in

if TYPE_CHECKING:
    import onnx_ir as ir

_BATCH = 2
_PROMPT = 7
_PAST = 6
_PADDING = 2
_SOURCE = 5
_CACHE_RANKS = (4, 5)  # keys and values apart, or packed in one
_LENGTH_AXIS = -2
_TABLE_SLOTS = {
    ("Gather", 1): 0, ("GatherBlockQuantized", 1): 0,
    ("EmbedLayerNormalization", 0): 2, ("EmbedLayerNormalization", 1): 4,
}  # fmt: skip
"""Operators that select rows, and the operand of the ids: where the table stands."""
_ANY_ROW = 2  # ids of a table that can't be told stay below this


@dataclass(frozen=True)
class Case:
    """One run: new tokens per sequence, and tokens in the cache."""

    name: str
    sequence_length: int
    past_length: int

    @property
    def total(self) -> int:
        """Tokens that attention sees."""
        return self.past_length + self.sequence_length


def cases(model: ir.Model, *, one: bool = False) -> list[Case]:
    """Prefill and decode for a graph with a cache, one run for any other."""
    if any(_is_cache(value) for value in model.graph.inputs):
        decode = Case("decode", 1, _PAST)
        return [decode] if one else [Case("prefill", _PROMPT, 0), decode]
    return [Case("encode", _PROMPT, 0)]


def draw(model: ir.Model, case: Case, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Fills every input of a graph.

    Token ids stay below the number of rows that they select from, masks are ones with the first
    sequence padded on the left, positions go on after the past, all else is normal noise. Axes
    of the same name get the same size; the mask's is past plus new tokens.
    """
    sizes = _axis_sizes(model, case)
    # An attention that keeps its cache to a window takes no padding on the left.
    padding = 0 if any(map(_window, model.graph.inputs)) else _PADDING
    return {
        value.name or "": _fill(value, _shape(value, sizes, case), case, padding, rng)
        for value in model.graph.inputs
        if not value.is_initializer()
    }


def half_written(model: ir.Model) -> set[str]:
    """Names of outputs that hold chance values beyond what was computed.

    An attention that keeps its cache to a window gives the whole buffer, filled or not.
    """
    windowed = (node for node in model.graph if _keeps_a_window(node))
    return {v.name or "" for node in windowed for v in node.outputs if v.is_graph_output()}


def _is_cache(value: ir.Value) -> bool:
    """``[..., batch, heads, length, head size]``, the length open, in floating point."""
    shape = value.shape
    return (
        shape is not None
        and len(shape) in _CACHE_RANKS
        and not isinstance(shape[_LENGTH_AXIS], int)
        and head_size(value) is not None
        and value.dtype is not None
        and value.dtype.is_floating_point()
    )


def _axis_sizes(model: ir.Model, case: Case) -> dict[str, int]:
    """Sizes for the names of axes; told by where the names stand."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        names = _axis_names(value)
        if _is_cache(value):
            rank = len(names)
            # What cross-attention reads of an encoder is there from the first step on.
            source = _SOURCE if "encoder" in _words(value) else None
            length = _window(value) or source or case.past_length
            _note(sizes, names, {rank - 4: _BATCH, rank + _LENGTH_AXIS: length})
            if (size := head_size(value)) is not None:
                _note(sizes, names, {rank - 1: size})
        elif _rows(value) is not None and not _is_mask(value):
            _note(sizes, names, {0: _BATCH, len(names) - 1: case.sequence_length})
    return sizes


def _window(value: ir.Value) -> int | None:
    """The room in a cache that its attention keeps to a window, however short the past is.

    It is a buffer that the attention fills in turn; one smaller than the window is refused.
    """
    for node, _ in value.uses():
        if _keeps_a_window(node):
            return node.attributes.get_int("local_window_size", 0) or None
    return None


def _keeps_a_window(node: ir.Node) -> bool:
    return bool(node.attributes.get_int("sliding_window_cache", 0))


def _note(sizes: dict[str, int], names: list[str | None], wanted: dict[int, int]) -> None:
    for axis, size in wanted.items():
        name = names[axis] if axis < len(names) else None
        if name is not None:
            sizes.setdefault(name, size)


def _axis_names(value: ir.Value) -> list[str | None]:
    if value.shape is None:
        return []
    return [None if isinstance(dim, int) else dim.value for dim in value.shape]


def _shape(value: ir.Value, sizes: dict[str, int], case: Case) -> tuple[int, ...]:
    """The size of each axis: as declared, as named, as a sum of names, or by its place."""
    dims = list(value.shape) if value.shape is not None else []
    return tuple(
        dim if isinstance(dim, int) else _size(dim.value, axis, value, sizes, case)
        for axis, dim in enumerate(dims)
    )


def _size(name: str | None, axis: int, value: ir.Value, sizes: dict[str, int], case: Case) -> int:
    if name is not None:
        terms = [term.strip() for term in name.split("+")]
        known = [sizes[term] if term in sizes else number_in(term) for term in terms]
        if all(size is not None for size in known):
            return sum(size for size in known if size is not None)
    if axis == 0 and value.shape is not None and len(value.shape) > 1:
        return _BATCH
    return case.total if _is_mask(value) else case.sequence_length


def _fill(
    value: ir.Value, shape: tuple[int, ...], case: Case, padding: int, rng: np.random.Generator
) -> NDArray[Any]:
    if value.dtype is None:
        raise VerificationError(
            f"The input {value.name!r} declares no type, so nothing can be drawn for it.",
            "Declare its type; or leave the check of the result out: --verify none",
            code="unknown-input",
        )
    dtype = value.dtype.numpy()
    if _is_mask(value):
        return _mask(shape, dtype, padding)
    if value.dtype.is_floating_point():
        return rng.standard_normal(shape).astype(dtype)
    if "position" in _words(value):
        past = case.past_length
        positions = np.arange(past, past + shape[-1]) if shape else np.asarray(past)
        return np.broadcast_to(positions, shape).astype(dtype)
    return rng.integers(0, _rows(value) or _ANY_ROW, shape).astype(dtype)


def _mask(shape: tuple[int, ...], dtype: Any, padding: int) -> NDArray[Any]:
    mask = np.ones(shape, dtype)
    if len(shape) == 2 and shape[1] > padding:
        mask[0, :padding] = 0
    return mask


def _is_mask(value: ir.Value) -> bool:
    return "mask" in _words(value)


def _words(value: ir.Value) -> list[str]:
    return re.split(r"[^a-z]+", (value.name or "").lower())


def _rows(value: ir.Value) -> int | None:
    """The rows of the smallest weight that an integer input selects from."""
    if value.dtype is None or value.dtype.is_floating_point():
        return None
    rows = [table.shape[0] for table in _tables(value) if isinstance(table.shape[0], int)]
    return min(rows, default=None)


def _tables(value: ir.Value) -> Iterator[Any]:
    for node, slot in value.uses():
        if (place := _TABLE_SLOTS.get((node.op_type, slot))) is not None:
            table = node.inputs[place]
            if table is not None and table.const_value is not None:
                yield table.const_value
        elif node.op_type in ("Cast", "Identity", "Reshape"):
            yield from _tables(node.outputs[0])
