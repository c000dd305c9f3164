"""Finds the rotary embedding of queries and keys, and the tables that it reads.

Source of the method: Su et al., RoFormer (arXiv 2104.09864). Exporters write it as the operator
(opset 23), on all of a head or on its first part, or as ``x * cos + rotated(x) * sin``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graph_passes.errors import FusionError
from graph_passes.fusing.attention_sites import AttentionSite, number_of
from graph_passes.fusing.masks import POSITIONS, Probe

_LAST_AXES = (3, -1)
_HEAD_STEP, _TABLE_STEP = 16, 8  # what ONNX Runtime's kernel asks of its sizes


@dataclass(frozen=True, eq=False)
class Rotary:
    """A rotated value."""

    inner: ir.Value  # before it was rotated, `[batch, heads, new, head size]`
    cos: ir.Value
    sin: ir.Value
    interleaved: bool = False
    doubled: bool = False


@dataclass(frozen=True, eq=False)
class RotaryTables:
    """What a decoder turns each position by."""

    query: ir.Value
    key: ir.Value
    sources: tuple[ir.Value, ir.Value]
    cos: NDArray[Any]  # `[positions, rotated size / 2]`
    sin: NDArray[Any]
    interleaved: bool


class RotaryFinder:
    """Looks at a graph's attentions one after another; each table is computed once."""

    def __init__(self, graph: ir.Graph, positions: int) -> None:
        self._graph = graph
        self._positions = positions
        self._tables: dict[tuple[ir.Value, bool], NDArray[Any] | str] = {}

    def tables(self, site: AttentionSite) -> RotaryTables | str:
        """The tables of an attention, or why its rotation has to stay outside of it."""
        query, key = _rotary(site.query), _rotary(site.key)
        if query is None and key is None:
            return ""
        if query is None or key is None or not _alike(query, key):
            return "queries and keys are not rotated alike"
        cos, sin = self._table(query.cos, query.doubled), self._table(query.sin, query.doubled)
        if isinstance(cos, str) or isinstance(sin, str):
            return cos if isinstance(cos, str) else str(sin)
        columns = cos.shape[1]
        if site.head_size % _HEAD_STEP or columns % _TABLE_STEP:
            return f"the kernel rotates no {2 * columns} of {site.head_size} numbers"
        sources = (query.cos, query.sin)
        return RotaryTables(query.inner, key.inner, sources, cos, sin, query.interleaved)

    def _table(self, value: ir.Value, doubled: bool) -> NDArray[Any] | str:
        if (value, doubled) not in self._tables:
            try:
                array: NDArray[Any] | str = _computed(self._graph, value, self._positions)
                if doubled and not isinstance(array, str):
                    array = _once(array)
            except FusionError as error:
                array = error.message.rstrip(".")
            self._tables[value, doubled] = array
        return self._tables[value, doubled]


def _computed(graph: ir.Graph, value: ir.Value, positions: int) -> NDArray[Any] | str:
    """A table for all positions, ``[positions, columns]``; or why there is none."""
    probe = Probe(graph, value)
    if set(probe.inputs) != {POSITIONS}:
        return f"the rotation depends on {', '.join(sorted(probe.inputs)) or 'no position'}"
    order = np.arange(positions, dtype=np.int64)
    table, turned, short = (_rows(probe, rows) for rows in (order, order[::-1], order[:3]))
    # Some rescale for long texts; such a table holds for one length.
    if not np.array_equal(table, turned[::-1]) or not np.array_equal(table[:3], short):
        return "the rotation depends on the text's length"
    return table


def _rows(probe: Probe, positions: NDArray[np.int64]) -> NDArray[Any]:
    array = probe.run({POSITIONS: positions[None]})
    return array.reshape(len(positions), -1)


def _once(table: NDArray[Any]) -> NDArray[Any] | str:
    one, other = np.split(table, 2, axis=1)
    return one if np.array_equal(one, other) else "the halves of a head are rotated differently"


def _alike(query: Rotary, key: Rotary) -> bool:
    one = (query.cos, query.sin, query.interleaved, query.doubled)
    return one == (key.cos, key.sin, key.interleaved, key.doubled)


def _rotary(value: ir.Value) -> Rotary | None:
    node = value.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type == "RotaryEmbedding":
        return _of_operator(node)
    if node.op_type == "Concat":
        return _of_part(node)
    return _of_sum(node) if node.op_type == "Add" else None


def _of_operator(node: ir.Node) -> Rotary | None:
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        return None
    inner, cos, sin = node.inputs[:3]
    part = node.attributes.get_int("rotary_embedding_dim", 0)
    if inner is None or cos is None or sin is None or part:
        return None
    return Rotary(inner, cos, sin, bool(node.attributes.get_int("interleaved", 0)))


def _of_part(concat: ir.Node) -> Rotary | None:
    """The first numbers of a head rotated, the rest as it was."""
    if len(concat.inputs) != 2 or concat.attributes.get_int("axis", 0) not in _LAST_AXES:
        return None
    first, rest = concat.inputs
    rotated = _rotary(first) if first is not None else None
    if rotated is None:
        return None
    begin, end = _slice(rotated.inner), _slice(rest)
    if begin is None or end is None or begin[0] is not end[0]:
        return None
    whole, start, stop = begin
    if start != 0 or stop != end[1] or end[2] < _last(whole):
        return None
    return Rotary(whole, rotated.cos, rotated.sin, rotated.interleaved, rotated.doubled)


def _of_sum(add: ir.Node) -> Rotary | None:
    """``x * cos + concat(-x[half:], x[:half]) * sin``."""
    products = [value.producer() if value is not None else None for value in add.inputs]
    if any(node is None or node.op_type != "Mul" for node in products):
        return None
    straight, turned = (node.inputs for node in products if node is not None)
    inner, cos = straight
    concat = turned[0].producer() if turned[0] is not None else None
    if inner is None or cos is None or turned[1] is None or concat is None:
        return None
    if concat.op_type != "Concat" or len(concat.inputs) != 2:
        return None
    negative = concat.inputs[0].producer() if concat.inputs[0] is not None else None
    if negative is None or negative.op_type != "Neg":
        return None
    upper, lower = _slice(negative.inputs[0]), _slice(concat.inputs[1])
    half = _last(inner) // 2
    if upper is None or lower is None or upper[0] is not inner or lower[0] is not inner:
        return None
    if lower[1:] != (0, half) or upper[1] != half or upper[2] < 2 * half:
        return None
    return Rotary(inner, cos, turned[1], doubled=True)


def _slice(value: ir.Value | None) -> tuple[ir.Value, float, float] | None:
    """What a piece was cut from along the last dimension, where it begins and ends."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Slice" or node.inputs[0] is None:
        return None
    numbers = [number_of(operand) for operand in node.inputs[1:]]
    if len(numbers) < 3 or None in numbers or (len(numbers) > 3 and numbers[3] != 1):
        return None
    start, stop, axis = numbers[:3]
    assert start is not None
    assert stop is not None
    return (node.inputs[0], start, stop) if axis in _LAST_AXES else None


def _last(value: ir.Value) -> int:
    size = value.shape[-1] if value.shape is not None else 0
    return size if isinstance(size, int) else 0
