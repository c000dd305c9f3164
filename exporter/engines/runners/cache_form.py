"""The form of a graph's KV cache: one that grows, or one buffer for past and present."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.engines.runners.base import Array
from exporter.engines.tensors import TensorSpec
from exporter.errors import BackendError
from graph_passes.files.storage import load_model
from graph_passes.finding.shapes import head_count, head_size

if TYPE_CHECKING:
    import onnx_ir as ir

_PASTS, _COS_TABLE = (3, 4), 7  # among GroupQueryAttention's inputs
_SIZES, _LENGTH, _RANK = (1, 3), 2, 4
_MASK = "attention_mask"


@dataclass(frozen=True)
class CacheForm:
    """What a graph tells about its caches ``[batch, heads, length, head size]``."""

    heads: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    # by cache input, the positions that its buffer has at least, however short the
    windows: Mapping[str, int] = field(default_factory=dict)
    buffer: int | None = None  # None where it fixes none
    positions: int | None = None  # None where there are none
    sums_mask: bool = False
    mask: int | None = None  # None where the mask is as long as what is filled

    @property
    def longest(self) -> int | None:
        """Positions that a text may have; None where the graph sets no limit."""
        return min((n for n in (self.buffer, self.positions) if n is not None), default=None)

    def length(self, past: str, positions: int) -> int:
        """How long a cache's buffer is for a text of so many positions."""
        return self.buffer or max(positions, self.windows.get(past, 0))

    def masked(self, mask: Array) -> Array:
        """An attention mask as long as the graph wants it; nothing is filled behind its end."""
        if self.mask is None or mask.shape[1] >= self.mask:
            return mask
        return np.pad(mask, ((0, 0), (0, self.mask - mask.shape[1])))

    def fixed_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """By input, the shape of a call whose caches and mask have their full length."""
        numbers = dict(shapes)
        if self.mask is None or shapes[_MASK][1] > self.mask:
            return numbers
        numbers[_MASK] = (shapes[_MASK][0], self.mask)
        for past in self.shared:
            batch, heads, _, size = shapes[past]
            numbers[past] = (batch, heads, self.mask, size)
        return numbers

    def with_room(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The caches that are past and present in one buffer, with room for a call's new tokens."""
        if "input_ids" not in inputs:
            return {}
        pasts = [past for past in self.shared if past in inputs]
        if self.mask is not None and inputs[_MASK].shape[1] == self.mask:
            return {past: inputs[past] for past in pasts}
        new = inputs["input_ids"].shape[1]
        arrays = {past: self._longer(past, inputs[past], new) for past in pasts}
        return arrays if self.mask is None else {**arrays, _MASK: self.masked(inputs[_MASK])}

    def filled_part(
        self, outputs: Mapping[str, Array], inputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Outputs of such a call, whose caches are no longer than what is in them."""
        total = inputs[_MASK].shape[1]
        presents = frozenset(self.shared.values())
        return {n: a[:, :, :total] if n in presents else a for n, a in outputs.items()}

    def _longer(self, past: str, cache: Array, new: int) -> Array:
        batch, heads, filled, size = cache.shape
        length = self.length(past, filled + new)
        if length < filled + new:
            raise BackendError(
                f"{past} has room for {length} positions; {filled + new} are needed.",
                "Ask for a shorter text.",
                code="cache-too-short",
            )
        tensor = np.zeros((batch, heads, length, size), cache.dtype)
        tensor[:, :, :filled] = cache
        return tensor

    def sized(self, spec: TensorSpec) -> TensorSpec:
        """With the heads and the head size of a cache, where the graph only names them."""
        batch, named, length, other = spec.shape
        heads, size = self.heads.get(spec.name, (None, None))
        return replace(spec, shape=(batch, heads or named, length, size or other))


def may_be_cache(spec: TensorSpec) -> bool:
    """Whether an input has a cache's dimensions."""
    return len(spec.shape) == _RANK


def has_fixed_length(spec: TensorSpec) -> bool:
    """Whether an input is a cache whose length the graph fixes."""
    return may_be_cache(spec) and isinstance(spec.shape[_LENGTH], int)


def sizes_are_told(spec: TensorSpec) -> bool:
    """Whether an input is no cache, or one whose heads and head size are declared."""
    return not may_be_cache(spec) or all(isinstance(spec.shape[n], int) for n in _SIZES)


def read_cache_form(path: Path) -> CacheForm:
    """Looks at a graph; its weights stay on disk."""
    graph = load_model(path).graph
    inputs = [value for value in graph.inputs if value.shape is not None]
    heads = {
        value.name or "": (head_count(value), head_size(value))
        for value in inputs
        if value.shape is not None and len(value.shape) == _RANK
    }
    nodes = [
        node
        for node in graph
        if (node.domain, node.op_type) == ("com.microsoft", "GroupQueryAttention")
    ]
    scattered = dict(filter(None, map(_scattered, graph)))
    shared = {past: present for node in nodes for past, present in _shared(node)} | scattered
    masks = [_fixed_size(value, 1) for value in inputs if value.name == _MASK]
    return CacheForm(
        heads,
        {past.name or "": present.name or "" for past, present in shared.items()},
        {past.name or "": size for node in nodes for past, size in _windows(node)},
        min(filter(None, (_fixed_size(past, _LENGTH) for past in shared)), default=None),
        min(filter(None, map(_table_rows, nodes)), default=None),
        bool(nodes),
        masks[0] if scattered and masks else None,
    )


def _shared(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """The pasts of an attention that nothing else reads, with the presents that are outputs.

    Whoever else reads a past, its length for one, would see the whole buffer.
    """
    for place in _PASTS:
        past = node.inputs[place] if place < len(node.inputs) else None
        number = place - _PASTS[0] + 1
        present = node.outputs[number] if number < len(node.outputs) else None
        if past is None or present is None:
            continue
        alone = len(list(past.uses())) == 1 and not past.is_graph_output()
        if past.is_graph_input() and present.is_graph_output() and alone:
            yield past, present


def _scattered(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The past and the present of a TensorScatter on a cache; None for any other node."""
    if node.domain != "" or node.op_type != "TensorScatter":
        return None
    past, present = node.inputs[0], node.outputs[0]
    if past is None or not past.is_graph_input() or not present.is_graph_output():
        return None
    return past, present


def _windows(node: ir.Node) -> Iterator[tuple[ir.Value, int]]:
    """The pasts of an attention that keeps a window, and how many positions that has."""
    if node.attributes.get_int("sliding_window_cache", 0):
        pasts = (node.inputs[place] for place in _PASTS)
        size = max(0, node.attributes.get_int("local_window_size", 0))
        yield from ((past, size) for past in pasts if past is not None)


def _fixed_size(value: ir.Value, axis: int) -> int | None:
    size = value.shape[axis] if value.shape is not None else None
    return size if isinstance(size, int) else None


def _table_rows(node: ir.Node) -> int | None:
    table = node.inputs[_COS_TABLE] if len(node.inputs) > _COS_TABLE else None
    rows = table.shape[0] if table is not None and table.shape is not None else None
    return rows if isinstance(rows, int) else None


IDS, MASK = "input_ids", "attention_mask"
ALONG_TOKENS = (IDS, "position_ids", "token_type_ids")
"""Inputs ``[batch, new]``."""

_CACHE_AXIS = 2

Run = Callable[[Mapping[str, Array], Sequence[str]], dict[str, Array]]


def needs_packing(inputs: Mapping[str, Array]) -> bool:
    """Whether such an attention would misread a call, or refuse it.

    inputs: a call's; `input_ids` `[batch, new]`, `attention_mask` `[batch, total]`.
    """
    if IDS not in inputs or MASK not in inputs:
        return False
    (batch, new), total = inputs[IDS].shape, inputs[MASK].shape[1]
    return (batch > 1 and 1 < new < total) or not np.all(inputs[MASK])


def padded_before(inputs: Mapping[str, Array]) -> bool:
    """Whether padding stands before a row's tokens, or among them."""
    if MASK not in inputs:
        return False
    array = inputs[MASK].astype(bool)
    return bool(np.any(array[:, 1:] & ~array[:, :-1]))


def run_packed(
    run: Run, inputs: Mapping[str, Array], outputs: Sequence[str], caches: Mapping[str, str]
) -> dict[str, Array]:
    """Runs a call whose rows are padded in any way.

    caches: by cache input, `[batch, heads, past, size]`, the output that continues it.
    """
    (batch, new), total = inputs[IDS].shape, inputs[MASK].shape[1]
    if any(inputs[past].shape[_CACHE_AXIS] != total - new for past in caches if past in inputs):
        raise BackendError(
            f"The attention mask has {total} positions; the caches and {new} new tokens make "
            "another number.",
            code="wrong-shape",
        )
    alone = 1 < new < total
    groups = [slice(row, row + 1) for row in range(batch)] if alone else [slice(0, batch)]
    arrays = []
    for rows in groups:
        part = {name: array[rows] if array.ndim else array for name, array in inputs.items()}
        order = _Packing.of(part[MASK], new)
        answer = run(order.packed(part, caches), outputs)
        arrays.append(order.restored(answer, set(caches.values())))
    return {name: np.concatenate([part[name] for part in arrays]) for name in outputs}


def packed(inputs: Mapping[str, Array], caches: Mapping[str, str]) -> dict[str, Array]:
    """A call with each row's real positions in front, whose results stay where they come."""
    return _Packing.of(inputs[MASK], inputs[IDS].shape[1]).packed(inputs, caches)


@dataclass(frozen=True)
class _Packing:
    """Which position of a call goes where."""

    past: NDArray[np.intp]  # of the cache's positions, the real ones first, `[batch, past]`
    new: NDArray[np.intp]  # the same of the new tokens, `[batch, new]`
    filled: NDArray[np.intp]  # how much of each row's past is real, `[batch]`
    real: NDArray[np.bool_]  # the mask, `[batch, past + new]`

    @classmethod
    def of(cls, mask: Array, new: int) -> _Packing:
        real = mask.astype(bool)
        past = real[:, : real.shape[1] - new]
        return cls(_front(past), _front(real[:, -new:]), past.sum(axis=1), real)

    def packed(self, inputs: Mapping[str, Array], caches: Mapping[str, str]) -> dict[str, Array]:
        """The same call with each row's real positions in front."""
        mask = inputs[MASK]
        result = np.arange(mask.shape[1]) < (self.filled + self.new.shape[1])[:, None]
        arrays: dict[str, Array] = {**inputs, MASK: result.astype(mask.dtype)}
        for name in ALONG_TOKENS:
            if name in inputs:
                arrays[name] = np.take_along_axis(inputs[name], self.new, axis=1)
        for name in caches:
            if name in inputs:
                arrays[name] = np.take_along_axis(
                    inputs[name], _along_cache(self.past), _CACHE_AXIS
                )
        return arrays

    def restored(self, outputs: Mapping[str, Array], caches: set[str]) -> dict[str, Array]:
        """The outputs of such a call with each position back in its place."""
        return {
            name: self._cache(array) if name in caches else self._tokens(array)
            for name, array in outputs.items()
        }

    def _tokens(self, array: Array) -> Array:
        if array.ndim < 2 or array.shape[1] != self.new.shape[1]:
            return array
        back = np.argsort(self.new, axis=1)
        return np.take_along_axis(array, back.reshape(*back.shape, *[1] * (array.ndim - 2)), 1)

    def _cache(self, array: Array) -> Array:
        length = self.past.shape[1]
        back: NDArray[Any] = np.empty(self.real.shape, np.intp)
        for row, filled in enumerate(self.filled):
            here = [*self.past[row, :filled], *(length + self.new[row]), *self.past[row, filled:]]
            back[row, here] = np.arange(len(here))
        moved = np.take_along_axis(array, _along_cache(back), _CACHE_AXIS)
        return np.where(self.real[:, None, :, None], moved, np.zeros((), array.dtype))


def _front(real: NDArray[np.bool_]) -> NDArray[np.intp]:
    """The order in which real positions come first, otherwise as they are."""
    return np.argsort(~real, axis=1, kind="stable")


def _along_cache(order: NDArray[np.intp]) -> NDArray[np.intp]:
    return order[:, None, :, None]
