"""The form of a graph's KV cache: one that grows, or one buffer that is past and present at once.

A cache that grows is read as ``past`` and written, longer, as ``present``: each step copies it all.
GroupQueryAttention of ONNX Runtime, and TensorScatter of ONNX, write the new keys and values into
the past's own buffer where both are bound to it; a step then copies nothing. The buffer has room
for the whole text from the start, and the attention mask tells how much of it is filled. With
TensorScatter both have lengths that the graph fixes, see
:mod:`graph_passes.fusing.cache_in_place`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

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
    """What a graph tells about its caches ``[batch, heads, length, head size]``.

    Attributes:
        heads: By input of four dimensions, its number of heads and its head size, declared or
            found in the graph; None for what can't be told.
        shared: By cache input, the output that may lie in the same buffer; empty where the cache
            grows.
        windows: By cache input, the positions that its buffer has at least, however short the
            text: those of the window that is kept in it.
        buffer: The length that the graph fixes for these buffers; None where it fixes none.
        positions: Rows of the rotary tables: no text can be longer; None where there are none.
        sums_mask: Whether an attention takes each row's length from the sum of its mask; see
            :mod:`exporter.engines.runners.left_padding`.
        mask: The length that the graph fixes for the attention mask, 0 where nothing is filled;
            None where the mask is as long as what is filled.
    """

    heads: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    windows: Mapping[str, int] = field(default_factory=dict)
    buffer: int | None = None
    positions: int | None = None
    sums_mask: bool = False
    mask: int | None = None

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
        """By input, the shape that a call has once its caches and its mask have their full length.

        Args:
            shapes: As long as what is filled. What has no room stays as it is.
        """
        found = dict(shapes)
        if self.mask is None or shapes[_MASK][1] > self.mask:
            return found
        found[_MASK] = (shapes[_MASK][0], self.mask)
        for past in self.shared:
            batch, heads, _, size = shapes[past]
            found[past] = (batch, heads, self.mask, size)
        return found

    def with_room(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The caches that are past and present in one buffer, with room for a call's new tokens.

        Args:
            inputs: A call's; caches are exactly as long as what is in them, or all of a call's
                inputs are as long as the graph fixes them.

        Returns:
            New arrays, zero where nothing is yet; with them the mask where its length is fixed.
            None where the number of new tokens isn't told.

        Raises:
            BackendError: The graph fixes a length that is too short.
        """
        if "input_ids" not in inputs:
            return {}
        pasts = [past for past in self.shared if past in inputs]
        if self.mask is not None and inputs[_MASK].shape[1] == self.mask:
            return {past: inputs[past] for past in pasts}
        new = inputs["input_ids"].shape[1]
        found = {past: self._longer(past, inputs[past], new) for past in pasts}
        return found if self.mask is None else {**found, _MASK: self.masked(inputs[_MASK])}

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
        found = np.zeros((batch, heads, length, size), cache.dtype)
        found[:, :, :filled] = cache
        return found

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
    """Looks at a graph; its weights stay on disk.

    Raises:
        OnnxFileError: It is no complete ONNX model.
    """
    graph = load_model(path).graph
    inputs = [value for value in graph.inputs if value.shape is not None]
    heads = {
        value.name or "": (head_count(value), head_size(value))
        for value in inputs
        if value.shape is not None and len(value.shape) == _RANK
    }
    nodes = [node for node in graph if _is_grouped(node)]
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


def _is_grouped(node: ir.Node) -> bool:
    return node.domain == "com.microsoft" and node.op_type == "GroupQueryAttention"


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
